"""Finding layers and linears, and refusing what is unknown by name."""

import pytest
import torch
from architecture_table import NAMES, PAGE, page
from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, MORE_DENSE, tiny_model
from torch import nn

from alphatoken.architecture import layer_linears, layer_weights, scored_linears, scored_parameters, scored_weights
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
        assert (central == "yes") == (direction == "yes") == (architecture != "falcon")
        assert (forward == "yes") == (architecture not in ("bloom", "falcon"))
        assert (propagation == "yes") == (architecture in ARCHITECTURES | MORE_DENSE)
