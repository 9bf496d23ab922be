"""A backward pass at response positions against one at all positions."""

import pytest
import torch
from oracles import relative_error
from tiny_models import ARCHITECTURES, MORE_DENSE, random_rows, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from alphatoken.architecture import ScoredLinear, scored_linears, scored_weights
from alphatoken.batching import make_batch
from alphatoken.capture import capture
from alphatoken.model import prepare_model

MASKS = [[0, 0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]


def rows_of(masks):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 50, (len(mask),), generator=generator).tolist() for mask in masks], masks


def test_the_span_is_from_the_first_predicting_position_to_the_last():
    assert make_batch(*rows_of(MASKS)).span.int().tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0] * 8,
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
    ]


@pytest.mark.parametrize("parameters", ["last-layers:2", "all-linear"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_DENSE, "mixtral", "qwen3_moe"])
def test_deltas_of_the_span_are_those_of_a_whole_backward_pass(architecture, parameters):
    scoring = prepare_model(tiny_model(architecture))
    linears = [x for x in scored_weights(scoring.model, parameters) if isinstance(x, ScoredLinear)]
    for rows in (rows_of(MASKS), random_rows(seed=len(architecture), count=3)):
        batch = make_batch(*rows)
        span = batch.span
        token_weights = torch.rand(batch.num_response_tokens)
        whole, narrow = (
            capture(scoring, batch, linears, token_weights=token_weights, responses_only=only) for only in (False, True)
        )
        for linear in linears:
            found, expected = narrow.deltas[linear.name], whole.deltas[linear.name]
            assert relative_error(found[span], expected[span]) < 1e-5
            assert expected[span].abs().max() > 0
        torch.testing.assert_close(narrow.losses, whole.losses)


def test_prompts_cost_no_products():
    """One row, a fifth of it response: the backward pass of the linears takes a fifth of the products."""
    scoring = prepare_model(tiny_model("llama"))
    linears = scored_linears(scoring.model, "all-linear")
    batch = make_batch([list(range(5, 45))], [[False] * 32 + [True] * 8])
    counts = {}
    for only in (False, True):
        with FlopCounterMode(display=False) as counter:
            capture(scoring, batch, linears, responses_only=only)
        counts[only] = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    entry = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")  # no gradient below
    inner = sum(
        x.module.weight.numel()
        for x in linears
        if not x.name.removesuffix(".weight").endswith(entry) and x.module not in scoring.local
    )
    assert counts[False] - counts[True] == 2 * (40 - 8) * inner
