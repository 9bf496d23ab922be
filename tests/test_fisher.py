"""The diagonal Fisher against a loop over tokens in float64, and its samples."""

import pytest
import torch
from oracles import captures, double, linear_matrix, positions, relative_error
from tiny_models import VOCABULARY, random_rows, tiny_model

from alphatoken.architecture import scored_parameters
from alphatoken.batching import make_batch
from alphatoken.errors import UserError
from alphatoken.fisher import diagonal_fisher, sample_responses
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


def test_samples_follow_the_model_and_the_seed():
    scoring = prepare_model(tiny_model("llama"))
    prompt = [5, 6, 7]
    options = {"max_new_tokens": 1, "end_ids": {2}}
    batch = sample_responses(scoring, [prompt] * 4000, list(range(4000)), seed=1, **options)
    again = sample_responses(scoring, [prompt] * 4000, list(range(4000)), seed=1, **options)
    assert torch.equal(batch.input_ids, again.input_ids)
    frequency = torch.bincount(batch.input_ids[:, 3], minlength=VOCABULARY) / 4000
    expected = scoring.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert float((frequency - expected).abs().max()) < 0.03
    assert batch.response_mask.sum() == 4000


def test_prompts_of_unequal_length_are_sampled_as_if_alone():
    """Left padding must not change the distribution: greedy-like check through the log-probabilities."""
    scoring = prepare_model(tiny_model("llama"))
    batch = sample_responses(scoring, [[5, 6, 7, 8, 9], [4]], [0, 1], max_new_tokens=6, end_ids={2}, seed=0)
    for ids, mask, prompt in zip(batch.input_ids.tolist(), batch.response_mask.tolist(), (5, 1), strict=True):
        assert mask[:prompt] == [False] * prompt and mask[prompt]
        assert ids[:prompt] == ([5, 6, 7, 8, 9] if prompt == 5 else [4])


def test_a_response_ends_with_its_end_of_turn():
    assert until_end([4, 5, 2, 9, 9], {2}) == [4, 5, 2]
    assert until_end([4, 5], {2}) == [4, 5]


def test_only_linear_weights_and_some_rows():
    scoring = prepare_model(tiny_model("llama"))
    with pytest.raises(UserError, match="all-linear"):
        diagonal_fisher(scoring, [], "all")
    with pytest.raises(UserError, match="prompt"):
        diagonal_fisher(scoring, [], "all-linear")
