"""The diagonal Fisher against a loop over tokens in float64, and its samples."""

import pytest
import torch
from oracles import captures, double, linear_matrix, positions, relative_error
from tiny_models import random_rows, tiny_model

from alphatoken.architecture import scored_parameters
from alphatoken.batching import make_batch
from alphatoken.errors import UserError
from alphatoken.fisher import diagonal_fisher, sampled_batch
from alphatoken.generation import until_end
from alphatoken.model import prepare_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_equals_the_sum_over_tokens_of_squares(architecture):
    model = tiny_model(architecture)
    oracle = double(model)
    rows = random_rows(seed=6, count=4)
    names = list(scored_parameters(model, "last-layers:2"))
    expected = {name: 0.0 for name in names}
    for ids, mask in zip(*rows, strict=True):
        h, delta, _ = captures(oracle, ids, mask, names)
        for v in positions(mask):
            expected = {n: expected[n] + torch.outer(delta[n][v] ** 2, h[n][v] ** 2) / 4 for n in names}
    batches = [make_batch(rows[0][:3], rows[1][:3]), make_batch(rows[0][3:], rows[1][3:])]
    found = diagonal_fisher(prepare_model(model), batches, "last-layers:2")
    for name in names:
        assert relative_error(found.tensors[name], linear_matrix(model, name, expected[name])) < 1e-5
    assert found.num_rows == 4


def test_a_batch_of_samples_scores_the_responses_alone():
    batch = sampled_batch([([5, 6, 7], [8, 2]), ([4], [9])])
    assert batch.input_ids.tolist()[0] == [5, 6, 7, 8, 2] and batch.input_ids.tolist()[1][:2] == [4, 9]
    assert batch.response_mask.tolist() == [[False] * 3 + [True] * 2, [False, True] + [False] * 3]


def test_a_response_ends_with_its_end_of_turn():
    assert until_end([4, 5, 2, 9, 9], {2}) == [4, 5, 2]
    assert until_end([4, 5], {2}) == [4, 5]


def test_only_linear_weights_and_some_rows():
    scoring = prepare_model(tiny_model("llama"))
    with pytest.raises(UserError, match="all-linear"):
        diagonal_fisher(scoring, [], "all")
    with pytest.raises(UserError, match="prompt"):
        diagonal_fisher(scoring, [], "all-linear")
