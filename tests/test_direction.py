"""Directions against plain autograd in float64."""

import pytest
import torch
from oracles import captures, double, gradient, linear_matrix, mean_gradient, positions, relative_error, token_losses
from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, VOCABULARY, random_rows, tiny_model
from transformers import OPTForCausalLM

from alphatoken import direction
from alphatoken.architecture import scored_parameters
from alphatoken.batching import make_batch
from alphatoken.capture import by_position
from alphatoken.errors import UserError
from alphatoken.fisher import diagonal_fisher
from alphatoken.model import prepare_model


def batches_of(rows, size):
    ids, masks = rows
    return [make_batch(ids[i : i + size], masks[i : i + size]) for i in range(0, len(ids), size)]


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("parameters", ["last-layers:2", "all-linear", "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mean_over_tokens_is_the_gradient_of_the_mean_loss(architecture, parameters):
    model = tiny_model(architecture)
    oracle = double(model)
    rows = random_rows(seed=9, count=4)
    names = list(scored_parameters(model, parameters))
    expected = mean_gradient(oracle, rows, names)
    found = direction.mean_gradient(
        prepare_model(model), batches_of(rows, 3), direction.GradientOptions(parameters=parameters)
    )
    total = {n: e for n, e in expected.items() if e.abs().max() > 1e-9}
    assert_close({n: found.tensors[n] for n in total}, total, 2e-5)
    assert found.num_rows == 4
    assert found.num_tokens == sum(map(sum, rows[1]))


@pytest.mark.parametrize("architecture", MORE_ARCHITECTURES)
def test_more_architectures_have_the_gradient_of_the_mean_loss(architecture):
    """What an untouched expert gets is zero, not nothing."""
    model = tiny_model(architecture, seed=2)
    oracle = double(model)
    scoring = prepare_model(model)
    rows = random_rows(seed=9, count=3, longest=20)
    everything = mean_gradient(oracle, rows, list(scored_parameters(model, "all")))
    rounding = 1e-3 if architecture == "qwen3_next" else 2e-5  # its kernel works in float32, in float64 models too
    for parameters in ("last-layers:2", "all-linear", "all"):
        found = direction.mean_gradient(scoring, batches_of(rows, 2), direction.GradientOptions(parameters=parameters))
        assert found.tensors.keys() == scored_parameters(model, parameters).keys()
        largest = max(float(g.abs().max()) for g in everything.values())
        for name, tensor in found.tensors.items():
            error = (tensor.double() - everything[name]).abs().max()
            assert error < rounding * max(float(everything[name].abs().max()), 1e-3 * largest), name


def test_response_positions_are_of_linear_layers():
    scoring = prepare_model(tiny_model("mixtral"))
    options = direction.GradientOptions(positions="response")
    with pytest.raises(UserError, match=r"mlp\.experts\.gate_up_proj.*MixtralExperts"):
        direction.mean_gradient(scoring, batches_of(random_rows(0, 2), 2), options)


@pytest.mark.parametrize("parameters", ["all-linear", "all"])
def test_class_weights_weigh_the_loss(parameters):
    model = tiny_model("qwen2")
    oracle = double(model)
    rows = random_rows(seed=2, count=3)
    weights = torch.ones(VOCABULARY)
    weights[:30] = 0.0
    weights[30:40] = 0.25
    names = list(scored_parameters(model, parameters))
    expected = mean_gradient(oracle, rows, names, weight=lambda token: float(weights[token]))
    options = direction.GradientOptions(parameters=parameters, class_weights=weights)
    assert_close(direction.mean_gradient(prepare_model(model), batches_of(rows, 2), options).tensors, expected, 2e-5)


def test_per_sequence_normalisation_is_the_mean_of_unit_gradients():
    model = tiny_model("llama")
    oracle = double(model)
    rows = random_rows(seed=2, count=3)
    names = list(scored_parameters(model, "all-linear"))
    expected = {name: 0.0 for name in names}
    for ids, mask in zip(*rows, strict=True):
        g = gradient(oracle, token_losses(oracle, ids, mask).sum(), names)
        length = torch.sqrt(sum(x.square().sum() for x in g.values()))
        expected = {n: expected[n] + g[n] / length / 3 for n in names}
    options = direction.GradientOptions(normalization="sequence")
    assert_close(direction.mean_gradient(prepare_model(model), batches_of(rows, 1), options).tensors, expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_response_positions_sum_outer_products_there_only(architecture):
    model = tiny_model(architecture)
    oracle = double(model)
    rows = random_rows(seed=6, count=3)
    names = list(scored_parameters(model, "last-layers:2"))
    expected, count = {name: 0.0 for name in names}, 0
    for ids, mask in zip(*rows, strict=True):
        h, delta, _ = captures(oracle, ids, mask, names)
        for v in positions(mask):
            count += 1
            expected = {n: expected[n] + torch.outer(delta[n][v], h[n][v]) for n in names}
    options = direction.GradientOptions(parameters="last-layers:2", positions="response")
    found = direction.mean_gradient(prepare_model(model), batches_of(rows, 3), options).tensors
    assert_close(found, {n: linear_matrix(model, n, e) / count for n, e in expected.items()})


def test_layers_that_see_rows_and_positions_as_one_dimension():
    """OPT's feed-forward ones. Where all but the first token is response, their positions are all that count."""
    opt = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    opt |= {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "model_type": "opt"}
    scoring = prepare_model(tiny_model("llama", **opt))
    assert isinstance(scoring.model, OPTForCausalLM)
    ids = [row[:6] for row in random_rows(seed=6, count=3)[0]]
    batches = [make_batch(ids, [[False] + [True] * 5] * 3)]
    everywhere, there = (
        direction.mean_gradient(scoring, batches, direction.GradientOptions("last-layers:1", positions=positions))
        for positions in ("all", "response")
    )
    assert_close(there.tensors, everywhere.tensors)
    shapes = {name: parameter.shape for name, parameter in scored_parameters(scoring.model, "last-layers:1").items()}
    assert {name: t.shape for name, t in diagonal_fisher(scoring, batches, "last-layers:1").tensors.items()} == shapes
    with pytest.raises(UserError, match=r"m works on tensors of shape \(7, 4\), not on rows and positions"):
        by_position({"m": torch.zeros(7, 4)}, batches[0])


def test_second_moments_and_adam_scale():
    model = tiny_model("llama")
    oracle = double(model)
    rows = random_rows(seed=6, count=4)
    names = list(scored_parameters(model, "last-layers:1"))
    expected = {name: 0.0 for name in names}
    for part in ((rows[0][:2], rows[1][:2]), (rows[0][2:], rows[1][2:])):
        g = mean_gradient(oracle, part, names)
        expected = {n: expected[n] + g[n].square() / 2 for n in names}
    moments = direction.second_moments(prepare_model(model), batches_of(rows, 2), "last-layers:1")
    assert_close(moments, expected)
    scale = direction.adam_scale({"w": torch.tensor([4.0, 0.0])})["w"]
    assert float(scale[0]) == pytest.approx(0.5) and torch.isfinite(scale).all()


def test_drift_is_fisher_times_distance_and_zero_at_the_reference():
    model = tiny_model("llama")
    weights = scored_parameters(model, "last-layers:1")
    names = list(weights)
    here = {n: p.detach().clone() for n, p in scored_parameters(model, "last-layers:1").items()}
    fisher = {n: torch.rand_like(here[n]) for n in names}
    assert not any(d.any() for d in direction.drift(weights, here, fisher).values())
    moved = {n: here[n] - 0.5 for n in names}
    for n, d in direction.drift(weights, moved, fisher).items():
        torch.testing.assert_close(d, fisher[n] * 0.5, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=names[0]):
        direction.drift(weights, {}, fisher)


def test_nothing_with_weight_is_an_error():
    scoring = prepare_model(tiny_model("llama"))
    rows = batches_of(random_rows(0, 2), 2)
    with pytest.raises(UserError, match="class-weights"):
        direction.mean_gradient(scoring, rows, direction.GradientOptions(class_weights=torch.zeros(VOCABULARY)))
    with pytest.raises(UserError, match="no validation row"):
        direction.mean_gradient(scoring, [], direction.GradientOptions())
    with pytest.raises(UserError, match="linear weights"):
        direction.mean_gradient(scoring, rows, direction.GradientOptions(parameters="all", positions="response"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_validation_row_that_is_not_finite(value):
    """Left out where rows count one by one; else an error, never a direction that makes every value NaN."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = value
    scoring = prepare_model(model)
    ids, masks = random_rows(0, 3)
    ids = [[min(token, VOCABULARY - 2) for token in row] for row in ids]
    alone = direction.GradientOptions(normalization="sequence")
    expected = direction.mean_gradient(scoring, batches_of((ids, masks), 1), alone)
    overflowing = [VOCABULARY - 1] * len(ids[0])
    rows = ([*ids, overflowing], [*masks, masks[0]])
    assert_close(direction.mean_gradient(scoring, batches_of(rows, 1), alone).tensors, expected.tensors)
    with pytest.raises(UserError, match="not finite"):
        direction.mean_gradient(scoring, batches_of(rows, 2), direction.GradientOptions())
    moments = direction.second_moments(scoring, batches_of(rows, 1), "all-linear")
    assert_close(moments, direction.second_moments(scoring, batches_of((ids, masks), 1), "all-linear"))
