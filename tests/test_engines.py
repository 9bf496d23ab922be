"""Which engine generates, and what it may be told."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from alphatoken.errors import UserError
from alphatoken.generate_config import EngineOptions
from pipelines import engines


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
    assert engines.choose_engine(EngineOptions(engine_options={"max_num_seqs": 4})) == "transformers"
    with pytest.raises(UserError, match="vLLM is not installed"):
        engines.choose_engine(EngineOptions(engine="vllm"))
