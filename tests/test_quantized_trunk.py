"""--trunk-dtype: what it refuses. Its values need torchao: tests/stacks/test_trunk.py."""

import sys

import pytest
import torch
from tiny_models import tiny_model

from alphatoken.config import ScoreConfig
from alphatoken.errors import UserError
from alphatoken.quantized_trunk import QuantizedTrunk

CPU = [torch.device("cpu")] * 9


def test_nothing_asked_for_is_nothing():
    assert QuantizedTrunk.of(None, "last-layers:1") is None


def test_all_layers_scored_leave_no_trunk():
    with pytest.raises(UserError, match="scores the first layer too.*last-layers:K"):
        QuantizedTrunk("int8", "all-linear").apply(tiny_model("llama"), CPU)


def test_layers_that_are_not_linear_are_refused():
    with pytest.raises(UserError, match="GPT2LMHeadModel are not torch's linear"):
        QuantizedTrunk("int8", "last-layers:1").apply(tiny_model("gpt2"), CPU)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_without_torchao_it_says_what_to_install(dtype, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=rf"--trunk-dtype {dtype} needs torchao: pip install 'alphatoken\[quantize\]'"):
        QuantizedTrunk(dtype, "last-layers:1").apply(tiny_model("llama"), CPU)


def test_losses_score_no_layers():
    with pytest.raises(ValueError, match="--trunk-dtype: for exact and value_propagation; loss is about no weights"):
        ScoreConfig(model="m", data=["d"], output="o", estimator="loss", trunk_dtype="int8")
