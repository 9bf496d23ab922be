"""Which engine generates, and what it may be told."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from masked_folder import write_model
from transformers import GenerationConfig

from alphatoken.errors import UserError
from alphatoken.generate_config import EngineOptions
from alphatoken.model import load_model
from alphatoken.rounds_config import RoundsConfig
from pipelines import engines
from pipelines.pair_generator import PairGenerator


@pytest.fixture
def vllm(monkeypatch):
    """As if it were installed, with two arguments."""

    @dataclass
    class AsyncEngineArgs:
        max_num_seqs: int = 0
        gpu_memory_utilization: float = 0.9

    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", SimpleNamespace(AsyncEngineArgs=AsyncEngineArgs))


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_engine_arguments_that_vllm_does_not_know_are_told_before_it_starts(vllm, engine):
    options = EngineOptions(engine=engine, engine_options={"max_num_seqs": 4})
    assert engines.choose_engine(options) == "vllm"
    options = EngineOptions(engine=engine, engine_options={"max_num_seq": 4})
    with pytest.raises(UserError, match="max_num_seq: vLLM has no such engine argument; did you mean max_num_seqs"):
        engines.choose_engine(options)


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert engines.choose_engine(EngineOptions()) == "transformers"
    for name, value in (("engine_options", {"max_num_seqs": 4}), ("tensor_parallel", 2)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: for vLLM, which is not installed"):
            engines.choose_engine(EngineOptions(**{name: value}))
    with pytest.raises(UserError, match="vLLM is not installed"):
        engines.choose_engine(EngineOptions(engine="vllm"))


@pytest.mark.parametrize("broken", [True, False])
def test_a_broken_device_ends_the_run_and_another_error_sets_its_prompt_aside(monkeypatch, broken):
    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered" if broken else "no such kernel")

    monkeypatch.setattr(engines, "draw_samples", fail)
    sampler = engines.TransformersSampler.__new__(engines.TransformersSampler)
    sampler.plan = SimpleNamespace(sampling=None, end_ids=())
    sampler.scoring = sampler.tokenizer = None
    rows = [{"prompt_ids": [1], "seed": 0, "reason": ""} for _ in range(2)]
    if broken:
        with pytest.raises(RuntimeError, match="CUDA error"):
            sampler._fill(rows)
    else:
        sampler._fill(rows)
        assert {row["reason"] for row in rows} == {"generation failed: no such kernel"}


def test_rounds_know_every_end_of_turn_that_generate_knows(tmp_path):
    """Of Gemma, the settings for generation alone name it: without them no response would ever end."""
    model = write_model(tmp_path / "model")
    GenerationConfig(eos_token_id=[5, 9]).save_pretrained(model)
    config = RoundsConfig(
        data=["d"], model=model, output="o", validation=["v"], objective="dpo", generate=2, rule="none"
    )
    ends = PairGenerator(config, load_model(model)).ends
    assert {5, 9} < ends == set(engines.end_ids(model, False))
