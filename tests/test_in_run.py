"""In-run values against offline values at the same weights, and the gradient of what is trained on."""

import pytest
import torch
from torch.nn import functional as F

from alphatoken.batching import Batch, make_batch
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.errors import UserError
from alphatoken.exact import Exact
from alphatoken.in_run import InRun, keep_by_quantile
from alphatoken.model import prepare_model
from alphatoken.value_propagation import ValuePropagation
from tests.tiny_models import ARCHITECTURES, random_rows, tiny_model

SCORED = ["last-layers:2", "all-linear"]


def batch_of(seed: int, count: int = 5) -> Batch:
    return make_batch(*random_rows(seed, count))


def direction_of(architecture: str, parameters: str, positions: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    scoring = prepare_model(tiny_model(architecture, dtype=dtype))
    return mean_gradient(scoring, [batch_of(7)], GradientOptions(parameters, positions=positions)).tensors


def training(architecture: str, estimator: str, parameters: str, dtype=torch.float64):
    """(InRun in training mode with a direction, offline values of batch_of(1))."""
    positions = "response" if estimator == "value_propagation" else "all"
    direction = direction_of(architecture, parameters, positions, dtype)
    offline = prepare_model(tiny_model(architecture, dtype=dtype))
    known = (
        ValuePropagation(offline, parameters, direction)
        if estimator == "value_propagation"
        else Exact(offline, parameters, direction, method="forward")
    )
    in_run = InRun(tiny_model(architecture, dtype=dtype).train(), estimator, parameters)
    in_run.set_direction(direction)
    return in_run, known(batch_of(1))


@pytest.mark.parametrize("parameters", SCORED)
@pytest.mark.parametrize("estimator", ["value_propagation", "exact"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_values_equal_offline_values(architecture, estimator, parameters):
    in_run, offline = training(architecture, estimator, parameters)
    batch = batch_of(1)
    found = in_run.forward(batch)
    scale = offline.adaptation.abs().max()
    assert scale > 0
    torch.testing.assert_close(found.values / scale, offline.adaptation / scale, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-found.losses.detach(), offline.logprobs)
    torch.testing.assert_close(in_run.value(batch).values / scale, found.values / scale, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ["value_propagation", "exact"])
def test_a_decoder_of_another_name(estimator):
    """Llama-4's is not where transformers looks for it. Experts in float32: grouped kernels know no float64."""
    changes = {"moe_layers": [0, 1], "no_rope_layers": [1, 1, 0, 1]}
    offline = prepare_model(tiny_model("llama4_text", **changes))
    direction = mean_gradient(offline, [batch_of(7)], GradientOptions("last-layers:2")).tensors
    known = (
        ValuePropagation(offline, "last-layers:2", direction)
        if estimator == "value_propagation"
        else Exact(offline, "last-layers:2", direction, method="forward")
    )
    in_run = InRun(tiny_model("llama4_text", **changes).train(), estimator, "last-layers:2")
    in_run.set_direction(direction)
    found, expected = in_run.forward(batch_of(1)).values, known(batch_of(1)).adaptation
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("estimator", ["value_propagation", "exact"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_training_has_the_gradient_of_the_kept_losses(architecture, estimator):
    """And what was accumulated before stays: gradients add to it, values do not touch it."""
    in_run, _ = training(architecture, estimator, "last-layers:2")
    model, batch = in_run.scoring.model, batch_of(1)
    plain = tiny_model(architecture, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)

    found = in_run.forward(batch)
    keep = found.values >= found.values.median()
    assert all((parameter.grad == 0.5).all() for parameter in model.parameters())
    (found.losses * keep).sum().backward()

    logits = plain(input_ids=batch.input_ids).logits[batch.predicting]
    losses = F.cross_entropy(logits.double(), batch.targets, reduction="none")
    expected = torch.autograd.grad((losses * keep).sum(), list(plain.parameters()))
    scale = max(gradient.abs().max() for gradient in expected)
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        worst = (parameter.grad - 0.5 - gradient).abs().max() / scale
        assert worst < 1e-6, f"{name}: {worst:.1e}"  # transformers' norms and softmax round to float32


def test_without_a_direction_there_are_losses_only():
    in_run = InRun(tiny_model("llama").train(), "value_propagation", "last-layers:2")
    found = in_run.forward(batch_of(1))
    assert found.values is None and found.losses.requires_grad
    assert not any(module._forward_hooks for module in in_run.scoring.model.modules())


def test_the_direction_is_that_of_a_frozen_copy_and_weights_stay_trainable():
    in_run = InRun(tiny_model("llama", dtype=torch.float64).train(), "exact", "all-linear")
    expected = direction_of("llama", "all-linear", "all", torch.float64)
    found = in_run.mean_gradient([batch_of(7)], GradientOptions("all-linear")).tensors
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in in_run.scoring.model.parameters())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),  # modules
        ("qwen2", {"model_type": "starcoder2", "residual_dropout": 0.5, "embedding_dropout": 0.5}),  # numbers
    ],
)
def test_dropout_is_off(architecture, options):
    model = tiny_model(architecture, **options).train()
    plain = [model(batch_of(1).input_ids).logits for _ in range(2)]
    assert not torch.equal(*plain)
    in_run = InRun(model, "value_propagation", "last-layers:1")
    losses = [in_run.forward(batch_of(1)).losses for _ in range(2)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ["value_propagation", "exact"])
def test_mixed_precision_is_close_to_float32(estimator):
    in_run, offline = training("llama", estimator, "last-layers:2", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = in_run.forward(batch_of(1))
    assert found.losses.dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([found.values.float(), offline.adaptation]))[0, 1]
    assert correlation > 0.99
    found.losses.sum().backward()


def test_what_in_run_does_not_know_is_refused_by_name():
    with pytest.raises(UserError, match="knows the estimators value_propagation and exact, not loss"):
        InRun(tiny_model("llama"), "loss", "last-layers:1")
    with pytest.raises(UserError, match="scores linear weights"):
        InRun(tiny_model("llama"), "exact", "all")


@pytest.mark.parametrize("seed", range(5))
def test_keep_by_quantile_is_the_quantile_of_each_branch(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 5, (40,), generator=generator).float()  # with ties
    rows = torch.sort(torch.randint(0, 8, (40,), generator=generator)).values
    branches = (rows >= 4).long()
    keep = keep_by_quantile(values, rows, branches, 0.3)
    for branch in (0, 1):
        mine = values[branches == branch].sort(descending=True).values
        threshold = mine[-(-3 * len(mine) // 10) - 1]
        for row in rows[branches == branch].unique():
            here = rows == row
            expected = values[here] >= min(threshold, values[here].max())
            assert torch.equal(keep[here], expected)


def test_keep_by_quantile_drops_what_is_not_finite():
    values = torch.tensor([1.0, torch.nan, 2.0, -torch.inf])
    keep = keep_by_quantile(values, torch.tensor([0, 0, 1, 2]), torch.zeros(4, dtype=torch.long), 1.0)
    assert keep.tolist() == [True, False, True, False]
