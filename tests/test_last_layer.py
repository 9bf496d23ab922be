"""The last layer at predicting positions alone against the whole layer."""

import pytest
import torch
from oracles import relative_error
from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, random_rows, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from alphatoken.architecture import scored_parameters
from alphatoken.batching import make_batch
from alphatoken.exact import Exact
from alphatoken.last_layer import local_linears
from alphatoken.model import ScoringModel, prepare_model

AFTER_ATTENTION = ("o_proj", "gate_proj", "up_proj", "down_proj")


def names_of(scoring: ScoringModel) -> set[str]:
    names = {module: name for name, module in scoring.model.named_modules()}
    assert all(f"{scoring.model.config.get_text_config().num_hidden_layers - 1}" in names[m] for m in scoring.local)
    return {names[module].rsplit(".", 1)[-1] for module in scoring.local}


@pytest.mark.parametrize(
    "architecture, expected",
    [
        ("llama", {"q_proj", *AFTER_ATTENTION}),
        ("gemma2", {"q_proj", *AFTER_ATTENTION}),
        ("gpt2", {"c_proj", "c_fc"}),  # queries, keys and values are one matrix
        ("phi3", {"o_proj", "gate_up_proj", "down_proj"}),
        ("gpt_neox", {"dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("mixtral", {"q_proj", "o_proj"}),  # what experts get depends on the router
        ("bloom", set()),  # computes attention itself
    ],
)
def test_keys_and_values_are_never_left_out(architecture, expected):
    assert names_of(prepare_model(tiny_model(architecture))) == expected


def test_a_matrix_of_zeros_is_no_reason_to_leave_one_out():
    model = tiny_model("llama")
    attention = model.model.layers[-1].self_attn
    with torch.no_grad():
        for module in (attention.q_proj, attention.o_proj):
            module.weight.zero_()
    assert attention.k_proj not in local_linears(model) and attention.v_proj not in local_linears(model)


@pytest.mark.parametrize("architecture", [x for x in (*ARCHITECTURES, *MORE_ARCHITECTURES) if x != "bloom"])
def test_states_and_values_are_those_of_the_whole_layer(architecture):
    scoring = prepare_model(tiny_model(architecture))
    whole = ScoringModel(scoring.model, scoring.head)
    batch = make_batch(*random_rows(seed=len(architecture), count=3))
    with torch.no_grad():
        assert relative_error(scoring.predicting_states(batch), whole.predicting_states(batch)) < 1e-5
    generator = torch.Generator().manual_seed(1)
    parameters = scored_parameters(scoring.model, "last-layers:2")
    direction = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    narrow, wide = (Exact(x, "last-layers:2", direction, method="forward")(batch) for x in (scoring, whole))
    assert relative_error(narrow.adaptation, wide.adaptation) < 1e-5
    assert relative_error(narrow.logprobs, wide.logprobs) < 1e-5
    assert not any("forward" in module.__dict__ for module in scoring.local)


def test_prompts_cost_less():
    scoring = prepare_model(tiny_model("llama"))
    batch = make_batch([list(range(5, 45))], [[False] * 32 + [True] * 8])
    counts = []
    for one in (ScoringModel(scoring.model, scoring.head), scoring):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one.predicting_states(batch)
        counts.append(sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op)))
    assert counts[0] - counts[1] == 2 * (40 - 8) * sum(module.weight.numel() for module in scoring.local)
