"""Class shares and agreement of a direction (alphatoken/direction_health.py) against autograd, token by token."""

import pytest
import torch
from oracles import double, gradient, positions, token_losses
from scipy.stats import spearmanr
from tiny_models import VOCABULARY, random_rows, tiny_model

from alphatoken import direction
from alphatoken.architecture import scored_parameters
from alphatoken.batching import make_batch
from alphatoken.direction_health import ClassShare, agreement, class_shares, concerns
from alphatoken.hidden_tangent import NoForwardMode
from alphatoken.model import prepare_model
from alphatoken.token_classes import TOKEN_CLASS_NAMES
from pipelines.direction_checks import tried

PARAMETERS = "last-layers:2"


def token_values(oracle, rows, tensors) -> list[tuple[int, float]]:
    """(token id, <gradient of its loss, tensors>) of every response token."""
    found = []
    for ids, mask in zip(*rows, strict=True):
        losses = token_losses(oracle, ids, mask)
        for loss, position in zip(losses, positions(mask), strict=True):
            grads = gradient(oracle, loss, list(tensors), keep=True)
            value = sum(float((grads[name] * tensors[name].double()).sum()) for name in tensors)
            found.append((ids[position + 1], value))
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_class_shares_add_up_to_the_direction(weighted):
    model = tiny_model("llama")
    scoring, oracle = prepare_model(model), double(model)
    rows = random_rows(seed=4, count=3)
    batches = [make_batch(rows[0], rows[1])]
    class_of = torch.arange(VOCABULARY) % len(TOKEN_CLASS_NAMES)
    weights = 1.0 + (torch.arange(VOCABULARY) % 3).float() if weighted else None
    options = direction.GradientOptions(PARAMETERS, class_weights=weights)
    found = direction.mean_gradient(scoring, batches, options)
    shares = class_shares(scoring, PARAMETERS, found.tensors, batches, class_of.to(torch.int8), weights)
    values = token_values(oracle, rows, found.tensors)
    weigh = (lambda token: float(weights[token])) if weighted else (lambda token: 1.0)
    squared = sum(float(t.double().square().sum()) for t in found.tensors.values())
    assert sum(weigh(token) * value for token, value in values) / found.weight == pytest.approx(squared, rel=1e-4)
    for number, name in enumerate(TOKEN_CLASS_NAMES):
        mine = [weigh(token) * value for token, value in values if class_of[token] == number]
        assert shares[name].direction == pytest.approx(sum(mine) / found.weight / squared, abs=1e-4)
        assert shares[name].tokens == pytest.approx(len(mine) / len(values))


def test_agreement_is_the_rank_correlation_of_values():
    model = tiny_model("llama")
    scoring, oracle = prepare_model(model), double(model)
    names = list(scored_parameters(model, PARAMETERS))
    rows, validation = random_rows(seed=4, count=3), random_rows(seed=7, count=4)
    options = direction.GradientOptions(PARAMETERS)
    halves = [
        direction.gradient_sum(scoring, [make_batch(validation[0][half::2], validation[1][half::2])], options)
        for half in range(2)
    ]
    whole = direction.mean_gradient(scoring, [make_batch(*validation)], options)
    both = (halves[0] + halves[1]).mean()
    for name in names:
        torch.testing.assert_close(both.tensors[name], whole.tensors[name])
    assert (both.num_rows, both.num_tokens) == (4, whole.num_tokens)
    found = agreement(scoring, PARAMETERS, [half.tensors for half in halves], [make_batch(*rows)])
    columns = [[value for _, value in token_values(oracle, rows, half.tensors)] for half in halves]
    assert found == pytest.approx(spearmanr(*columns).statistic, abs=1e-3)


def test_concerns_name_what_is_wrong():
    fair = {"end-of-turn": ClassShare(0.1, 0.05), "words": ClassShare(0.9, 0.95)}
    heavy = {"end-of-turn": ClassShare(0.6, 0.05), "words": ClassShare(0.4, 0.95)}
    assert concerns(fair, 0.8, 20) == [] and concerns(fair, None, 1) == []
    (text,) = concerns(heavy, 0.8, 20)
    assert "60% of the validation direction comes from end-of-turn tokens, which are 5%" in text
    (text,) = concerns(fair, 0.3, 20)
    assert "two halves of the 20 validation rows" in text and "0.30" in text


def test_a_model_without_forward_mode_is_checked_by_central_difference():
    scoring = prepare_model(tiny_model("bloom"))
    batches = [make_batch(*random_rows(seed=4, count=3))]
    class_of = torch.arange(VOCABULARY) % len(TOKEN_CLASS_NAMES)
    found = direction.mean_gradient(scoring, batches, direction.GradientOptions(PARAMETERS))
    asked = []

    def measure(method):
        asked.append(method)
        return class_shares(scoring, PARAMETERS, found.tensors, batches, class_of, method=method), 0.5

    shares, agreed = tried(measure, torch.float32)
    assert asked == ["forward", "central"] and agreed == 0.5
    assert sum(share.direction for share in shares.values()) == pytest.approx(1)
    assert tried(measure, torch.bfloat16) == ({}, None)  # a step would be rounded away
    assert asked[2:] == ["forward"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), IndexError("position 1024"), NoForwardMode("gelu")])
def test_a_direction_is_not_lost_to_its_check(error, caplog):
    def measure(method):
        raise error

    assert tried(measure, torch.float32) == ({}, None)
    assert f"the direction was not checked: {error}" in caplog.text


def test_shares_of_rows_without_any_weight_are_numbers():
    model = tiny_model("llama")
    scoring, batches = prepare_model(model), [make_batch(*random_rows(seed=4, count=2))]
    tensors = {name: torch.ones_like(p) for name, p in scored_parameters(model, PARAMETERS).items()}
    class_of, nothing = torch.zeros(VOCABULARY, dtype=torch.int8), torch.zeros(VOCABULARY)
    shares = class_shares(scoring, PARAMETERS, tensors, batches, class_of, nothing)
    assert {share.direction for share in shares.values()} == {0.0}
