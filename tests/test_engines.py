"""Which engine generates, and what it may be told."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pyarrow as pa
import pytest
from masked_folder import write_model
from transformers import GenerationConfig

from alphatoken import schema
from alphatoken.errors import UserError
from alphatoken.generate_config import EngineOptions
from alphatoken.model import load_model
from alphatoken.rounds_config import RoundsConfig
from alphatoken.sampling import Sample
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
    ends = PairGenerator(config, load_model(model), "").ends
    assert {5, 9} < ends == set(engines.end_ids(model, False))


def prompts_for_pairs(count: int) -> pa.Table:
    rows = [
        {"row_id": n, "id": f"p{n}", "prompt_ids": [20 + n] * (n + 1), "answer": "4", "truncated": False}
        for n in range(count)
    ]
    table = pa.Table.from_pylist(rows, schema=schema.ENCODED_PROMPTS)
    return table.append_column("row_index", pa.array(range(count), pa.int64()))


@pytest.mark.parametrize("error, said", [(MemoryError(), "out of memory"), (IndexError("oh"), "IndexError: oh")])
def test_a_prompt_that_cannot_be_answered_is_put_aside(tmp_path, monkeypatch, error, said):
    """Alone: the others of its batch are answered."""
    longest = 3

    def draw(scoring, tokenizer, prompts, seeds, options, ends):
        if any(len(prompt) == longest for prompt in prompts):
            raise error
        return [Sample([7], f"{seed}", None, "stop") for seed in seeds]

    monkeypatch.setattr("pipelines.pair_generator.draw_samples", draw)
    model = write_model(tmp_path / "model")
    config = RoundsConfig(
        data=["d"], model=model, output="o", validation=["v"], objective="dpo", generate=2, rule="none",
        verifier="tests.own_verifier:last_digits",
    )  # fmt: skip
    generator = PairGenerator(config, load_model(model), "")
    pairs, reasons = generator(prompts_for_pairs(4), 0)
    assert pairs["row_index"].to_pylist() == [0, 1, 3]
    assert list(reasons) == [2] and reasons[2].startswith("no response could be generated: ") and said in reasons[2]
    longest = 1
    with pytest.raises(RuntimeError, match="CUDA error"):
        error = RuntimeError("CUDA error: an illegal memory access was encountered")
        generator(prompts_for_pairs(4), 0)


def test_an_own_verifier_is_looked_for_where_the_run_was_started(tmp_path):
    """An actor may run in another folder."""
    (tmp_path / "judge_of_the_driver.py").write_text("def f(response, answer): return 1.0\n")
    model = write_model(tmp_path / "model")
    config = RoundsConfig(
        data=["d"], model=model, output="o", validation=["v"], objective="dpo", generate=2, rule="none",
        verifier="judge_of_the_driver:f",
    )  # fmt: skip
    assert PairGenerator(config, load_model(model), str(tmp_path)).verify("", "") == 1.0
