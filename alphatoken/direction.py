"""The validation direction G and the Fisher-drift D: the tangents that values are measured along.

    G = sum_v w_v grad l_v / sum_v w_v        normalization "token" (the paper, with w = 1)
    G = mean over rows of g / |g|, g = sum_v w_v grad l_v of the row        normalization "sequence"
    G = mean over pairs of the gradient of their DPO loss        with weights by pair_direction.py
    D = F * (W - W_ref)                       Eq. 10
    preconditioner "adam": both are divided by sqrt(v) + eps, v the second moments of training gradients

`positions="all"` is the gradient itself. `positions="response"` sums delta_p h_p^T over response positions only,
which is the paper's mean over validation tokens (Eq. 8); the two differ in what prompt positions contribute.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import nn

from alphatoken.architecture import (
    ScoredLinear,
    ScoredTensor,
    scored_linears,
    scored_parameters,
    scored_weights,
)
from alphatoken.batching import Batch
from alphatoken.capture import capture
from alphatoken.contraction import outer_sum
from alphatoken.errors import UserError
from alphatoken.model import ScoringModel

logger = logging.getLogger(__name__)

ADAM_EPS = 1e-8

Tensors = dict[str, torch.Tensor]  # parameter name -> float32 tensor in the parameter's stored shape


@dataclass(frozen=True)
class GradientOptions:
    """How a set of rows becomes one direction; the module says what each does to it."""

    parameters: str = "all-linear"  # last-layers:K | all-linear | all
    normalization: str = "token"  # token | sequence
    positions: str = "all"  # all | response (Eq. 8)
    class_weights: torch.Tensor | None = None  # V float32: weight of each token id in the validation loss


class TokenWeights(Protocol):
    """How much the loss of each token counts; without one, all count alike."""

    rows_per_example: int  # rows of a batch that are one validation example

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """(weights N, what their gradient is divided by)."""


@dataclass(frozen=True)
class MeanGradient:
    """A direction and what stands behind it."""

    tensors: Tensors
    num_rows: int
    num_tokens: int
    weight: float  # what `tensors` was divided by: parts of the rows combine by it


@dataclass(frozen=True)
class GradientSum:
    """Gradients of some rows, added up."""

    tensors: Tensors = field(default_factory=dict)
    num_rows: int = 0
    num_tokens: int = 0
    weight: float = 0.0

    def __add__(self, other: "GradientSum") -> "GradientSum":
        total = {name: tensor.clone() for name, tensor in self.tensors.items()}
        add_into(total, other.tensors)
        counts = (getattr(self, name) + getattr(other, name) for name in ("num_rows", "num_tokens", "weight"))
        return GradientSum(total, *counts)

    def mean(self) -> MeanGradient:
        """UserError where there is nothing to take the mean of."""
        if not self.num_rows:
            raise UserError("no validation row could be used, so there is no direction; check --validation")
        if not self.weight:
            raise UserError(
                "no validation token has a weight above zero, so there is no direction; check --class-weights"
            )
        if not _all_finite(self.tensors):
            raise UserError(
                "the gradient of the validation rows is not finite (NaN or infinity), so there is no direction: the "
                "model overflows on one of them; --normalization sequence leaves such rows out, --dtype float32 may "
                "not overflow"
            )
        mean = {name: tensor / self.weight for name, tensor in self.tensors.items()}
        return MeanGradient(mean, self.num_rows, self.num_tokens, self.weight)


def mean_gradient(
    scoring: ScoringModel, batches: Iterable[Batch], options: GradientOptions, weigh: TokenWeights | None = None
) -> MeanGradient:
    """The direction G of `batches` (one example per batch where normalization is "sequence").

    It is a gradient, not a step: a step that helps goes against it. In nats per unit of weight with normalization
    "token", without a unit with "sequence".

    Raises:
        UserError: no validation token has weight, the gradient is not finite, or `positions` does not fit
            `parameters`.
    """
    return gradient_sum(scoring, batches, options, weigh).mean()


def gradient_sum(
    scoring: ScoringModel,
    batches: Iterable[Batch],
    options: GradientOptions,
    weigh: TokenWeights | None = None,
    so_far: GradientSum | None = None,
) -> GradientSum:
    """What `mean_gradient` is the mean of; may be empty. UserError where `positions` does not fit `parameters`.

    so_far: what is added to; its tensors are taken over.
    """
    if options.parameters == "all" and options.positions == "response":
        raise UserError("--positions response is defined for linear weights; use last-layers:K or all-linear")
    so_far = so_far or GradientSum()
    total, num_rows, num_tokens, weight_sum = so_far.tensors, so_far.num_rows, so_far.num_tokens, so_far.weight
    rows_per_example = weigh.rows_per_example if weigh else 1
    for batch in batches:
        gradient, weight = batch_gradient(scoring, batch, options, weigh)
        if options.normalization == "sequence":
            assert batch.input_ids.shape[0] == rows_per_example, "per-sequence normalisation needs one row per batch"
            length = torch.sqrt(cast(torch.Tensor, sum(g.square().sum() for g in gradient.values())))
            usable = bool(weight) and 0 < float(length) < math.inf
            if not torch.isfinite(length):
                logger.warning("a validation row was left out: its gradient is not finite (NaN or infinity)")
            gradient = {name: g / length if usable else torch.zeros_like(g) for name, g in gradient.items()}
            weight = float(usable)
        add_into(total, gradient)
        weight_sum += weight
        num_rows += batch.input_ids.shape[0] // rows_per_example
        num_tokens += batch.num_response_tokens
    return GradientSum(total, num_rows, num_tokens, weight_sum)


def batch_gradient(
    scoring: ScoringModel, batch: Batch, options: GradientOptions, weigh: TokenWeights | None = None
) -> tuple[Tensors, float]:
    """(gradient of the weighted sum of losses by parameter name, sum of the weights; with `weigh` what that says)."""
    weights = None
    weight_sum = float(batch.num_response_tokens)
    if options.class_weights is not None:
        weights = options.class_weights.to(batch.input_ids.device)[batch.targets]
        weight_sum = float(weights.sum())
    if weigh is not None:
        own, weight_sum = weigh(batch)
        weights = own if weights is None else own * weights
    if options.parameters == "all":
        return _gradient_by_autograd(scoring, batch, scored_parameters(scoring.model, "all"), weights), weight_sum
    scored = scored_weights(scoring.model, options.parameters)
    if options.positions == "all" and any(isinstance(weight, ScoredTensor) for weight in scored):
        parameters = {weight.name: weight.parameter for weight in scored}
        return _gradient_by_autograd(scoring, batch, parameters, weights), weight_sum
    linears = scored_linears(scoring.model, options.parameters)
    return _gradient_of_linears(scoring, batch, linears, weights, options.positions), weight_sum


def _gradient_of_linears(
    scoring: ScoringModel, batch: Batch, linears: list[ScoredLinear], weights: torch.Tensor | None, positions: str
) -> Tensors:
    responses_only = positions == "response"
    captured = capture(
        scoring, batch, linears, token_weights=weights, responses_only=responses_only, positions_matter=responses_only
    )
    where = batch.predicting if responses_only else ...
    result = {}
    for linear in linears:
        delta, h = captured.deltas[linear.name][where], captured.inputs[linear.name][where]
        gradient = outer_sum(delta.reshape(-1, delta.shape[-1]), h.reshape(-1, h.shape[-1]))
        result[linear.name] = linear.to_native(gradient)
    return result


def _gradient_by_autograd(
    scoring: ScoringModel, batch: Batch, parameters: dict[str, nn.Parameter], weights: torch.Tensor | None
) -> Tensors:
    """Of any parameters: the head's gradient by chunks, the rest by autograd from the final hidden states."""
    head_names = {id(p): name for name, p in parameters.items()}
    projection = scoring.head.projection
    with_head = id(projection.weight) in head_names
    if with_head and projection.bias is not None:
        raise UserError("--parameters all does not support an output head with a bias; use all-linear")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            predicting = scoring.predicting_states(batch)
        wide = torch.promote_types(scoring.dtype, torch.float32)
        head_gradient = torch.zeros_like(projection.weight, dtype=wide) if with_head else None
        head = scoring.head(
            predicting.detach(),
            batch.targets,
            gradient=True,
            weight_gradient=head_gradient,
            token_weights=weights,
        )
        assert head.hidden_gradient is not None
        upstream = head.hidden_gradient
        if weights is not None:
            upstream = upstream * weights[:, None].to(upstream.dtype)
        gradients = torch.autograd.grad(predicting, list(parameters.values()), upstream, allow_unused=True)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    result = {
        name: torch.zeros_like(p, dtype=wide) if g is None else g.to(wide)
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }
    if with_head:
        result[head_names[id(projection.weight)]] += head_gradient
    return result


def second_moments(
    scoring: ScoringModel, batches: Iterable[Batch], parameters: str, weigh: TokenWeights | None = None
) -> Tensors:
    """Mean over training batches of the squared gradient of the batch's mean loss: what AdamW's v averages."""
    total: Tensors = {}
    count = 0
    options = GradientOptions(parameters=parameters)
    for batch in batches:
        gradient, weight = batch_gradient(scoring, batch, options, weigh)
        squares = {name: (g / max(weight, 1.0)).square() for name, g in gradient.items()}
        if not _all_finite(squares):
            logger.warning("a training batch was left out of the preconditioner: its gradient is not finite")
            continue
        add_into(total, squares)
        count += 1
    if not count:
        raise UserError("the AdamW preconditioner needs at least one training row; check --preconditioner-data")
    return {name: tensor / count for name, tensor in total.items()}


def adam_scale(moments: Tensors, eps: float = ADAM_EPS) -> Tensors:
    """1 / (sqrt(v) + eps): what AdamW multiplies a gradient by.

    A weight without any gradient in the sample (v = 0) would get 1 / eps, so v is floored at a millionth of the mean
    over its tensor.
    """
    return {name: 1.0 / (torch.sqrt(v.clamp_min(1e-6 * float(v.mean()))) + eps) for name, v in moments.items()}


def drift(weights: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], fisher: Tensors) -> Tensors:
    """D = F * (W - W_ref), Eq. 10, of the weights that `fisher` has; on their device.

    weights, reference: as they are stored or trained, for what training moves is less than bfloat16 rounds off.

    Raises:
        UserError: the reference lacks a weight, or it has another shape there.
    """
    result = {}
    for name, importance in fisher.items():
        ours = weights[name].detach()
        if name not in reference or reference[name].shape != ours.shape:
            raise UserError(f"the reference model has no weight {name} of shape {tuple(ours.shape)}")
        result[name] = importance.to(ours.device) * (ours.float() - reference[name].detach().to(ours.device).float())
    return result


def _all_finite(tensors: Tensors) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def add_into(total: Tensors, more: Tensors) -> None:
    """total += more, in place."""
    for name, tensor in more.items():
        if name in total:
            total[name] += tensor
        else:
            total[name] = tensor.clone()
