"""Finding layers and linears, and refusing what is unknown by name."""

import re

import pytest
import torch
from architecture_table import NAMES, PAGE, page
from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, MORE_DENSE, tiny_model
from torch import nn

from alphatoken.architecture import (
    first_scored_layer,
    layer_linears,
    layer_weights,
    scored_linears,
    scored_parameters,
    scored_weights,
)
from alphatoken.config import DirectionConfig
from alphatoken.errors import UserError


@pytest.mark.parametrize("architecture", ARCHITECTURES | MORE_ARCHITECTURES)
def test_every_matrix_of_a_layer_is_a_scored_linear(architecture):
    model = tiny_model(architecture)
    named = dict(model.named_parameters())
    scored = scored_parameters(model, "all-linear")
    assert all(named[name] is parameter for name, parameter in scored.items())
    matrices = {n for n, p in named.items() if p.dim() >= 2 and (".layers." in n or ".h." in n)}
    matrices -= {n for n in matrices if n.endswith("_proj_bias")}  # gpt-oss: a bias for each expert
    assert scored.keys() == matrices
    assert scored_parameters(model, "all").keys() == named.keys()
    last = {x.layer for x in scored_weights(model, "last-layers:2")}
    assert last == {2, 3}


def test_fused_experts_are_no_linear_layers():
    model = tiny_model("mixtral")
    experts = {n for n in scored_parameters(model, "all-linear") if ".experts." in n or ".gate." in n}
    assert len(experts) == 4 * 3
    with pytest.raises(UserError, match=r"mlp\.experts\.\w+.*left out"):
        layer_linears(model)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_an_unknown_matrix_is_an_error_that_names_it(shape):
    for architecture in ("llama", "mixtral"):
        model = tiny_model(architecture)
        model.model.layers[1].mlp.extra = nn.Parameter(torch.zeros(shape))
        for find in (layer_weights, layer_linears):
            with pytest.raises(UserError, match=r"layers\.1\.mlp\.extra"):
                find(model)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_pattern_finds_weights_by_name(architecture):
    model = tiny_model(architecture)
    every = scored_parameters(model, "all-linear")
    of_values, of_layer = r"\.[23]\..*(v_proj|c_attn)\.weight", r"(layers|h)\.1\..*(proj|c_\w+|gate)(\.weight|$)"
    for pattern in (of_values, of_layer, r"proj.*weight"):
        found = scored_parameters(model, f"pattern:{pattern}")
        assert list(found) == [name for name in every if re.search(pattern, name)] and found
        assert all(found[name] is every[name] for name in found)
    assert first_scored_layer(model, f"pattern:{of_values}") == 2
    assert first_scored_layer(model, r"pattern:proj.*weight") == 0
    config = {"model": "m", "validation": ["v"], "output": "o"}
    assert DirectionConfig(**config, parameters="pattern:v_proj").parameters == "pattern:v_proj"
    for wrong, message in (
        ("pattern:", "is not last-layers"),
        ("pattern:v_(", "no regular expression"),
        ("lor", "lora"),
    ):
        with pytest.raises(ValueError, match=message):
            DirectionConfig(**config, parameters=wrong)


@pytest.mark.parametrize(
    ("architecture", "pattern", "message"),
    [
        ("llama", "x_proj", r"finds no weight; names are like model\.layers\.0\.self_attn\.q_proj\.weight"),
        ("qwen2", "q_proj", r"finds model\.layers\.0\.self_attn\.q_proj\.bias, .* \.\.\., which is no linear weight"),
        ("qwen2", "embed", r"finds model\.embed_tokens\.weight, which is no linear weight"),
        ("qwen2", "lm_head", r"finds lm_head\.weight, which is no linear weight of a decoder layer"),
        ("llama", r"layers\.3\.input_layernorm", r"finds model\.layers\.3\.input_layernorm\.weight"),
    ],
)
def test_a_pattern_that_finds_something_else_or_nothing(architecture, pattern, message):
    with pytest.raises(UserError, match=message):
        scored_weights(tiny_model(architecture), f"pattern:{pattern}")


def test_a_pattern_of_experts_is_for_the_exact_estimator():
    model = tiny_model("mixtral")
    assert len(scored_weights(model, r"pattern:experts\.(gate_up|down)_proj")) == 2 * 4
    with pytest.raises(UserError, match=r"not the weight of a linear layer.*--estimator exact"):
        scored_linears(model, r"pattern:experts\.down_proj")


def test_more_layers_than_the_model_has():
    with pytest.raises(UserError, match="only 4"):
        scored_linears(tiny_model("llama"), "last-layers:5")


def test_the_table_in_the_documentation_is_what_runs():
    """And every "yes" is an architecture whose values are tested against a definition."""
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(), "run `python -m tests.architecture_table`"
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in written.splitlines()}
    for architecture, name in NAMES.items():
        forward, central, propagation, direction, _ = rows[name]
        assert central == direction == "yes"
        assert (forward == "yes") == (architecture != "bloom")
        assert (propagation == "yes") == (architecture in ARCHITECTURES | MORE_DENSE)
