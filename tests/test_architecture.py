"""Finding layers and linears, and refusing what is unknown by name."""

import pytest
import torch
from tiny_models import ARCHITECTURES, COMMON, tiny_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from alphatoken.architecture import layer_linears, scored_linears, scored_parameters
from alphatoken.errors import UserError


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_of_a_layer_is_a_scored_linear(architecture):
    model = tiny_model(architecture)
    named = dict(model.named_parameters())
    scored = scored_parameters(model, "all-linear")
    assert all(named[name] is parameter for name, parameter in scored.items())
    matrices = {n for n, p in named.items() if p.dim() >= 2 and (".layers." in n or ".h." in n)}
    assert scored.keys() == matrices
    assert scored_parameters(model, "all").keys() == named.keys()
    last = {x.layer for x in scored_linears(model, "last-layers:2")}
    assert last == {2, 3}


def test_fused_experts_are_an_error_that_names_them():
    config = MixtralConfig(**COMMON, num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(UserError, match=r"mlp\.experts\.\w+.*left out"):
        layer_linears(MixtralForCausalLM(config))


def test_an_unknown_matrix_is_an_error_that_names_it():
    model = tiny_model("llama")
    model.model.layers[1].mlp.extra = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.extra"):
        layer_linears(model)


def test_more_layers_than_the_model_has():
    with pytest.raises(UserError, match="only 4"):
        scored_linears(tiny_model("llama"), "last-layers:5")
