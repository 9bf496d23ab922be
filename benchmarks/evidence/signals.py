"""Values of a window's response tokens at the current weights, by the library's estimators.

A signal says what is computed; `Scorer` computes it for rows, with the optimizer's own second moments where asked.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from alphatoken.architecture import decoder
from alphatoken.baselines import Baseline, random_values
from alphatoken.direction import (
    GradientOptions,
    Tensors,
    adam_scale,
    add_into,
    batch_gradient,
)
from alphatoken.exact import Exact
from alphatoken.model import ScoringModel
from alphatoken.value_propagation import ValuePropagation
from benchmarks.evidence.data import Row, batch_of, batches_of


@dataclass(frozen=True)
class Signal:
    """name: exact, value_propagation, loss, entropy, excess_loss or random. The rest is for the first two."""

    name: str = "exact"
    parameters: str = "all-linear"
    preconditioner: str = "adam"
    normalization: str = "token"
    without_end_of_turn: bool = False  # weight 0 for end-of-turn tokens in the validation loss

    @property
    def has_direction(self) -> bool:
        return self.name in ("exact", "value_propagation")


@dataclass(frozen=True)
class Values:
    """Flat over the response tokens of rows, in row order."""

    value: np.ndarray  # N
    loss: np.ndarray  # N
    offsets: np.ndarray  # R + 1
    stability: np.ndarray | None = None  # N, where the scorer has a drift


class Scorer:
    """Computes signals on one model. `moments` gives the optimizer's second moments by parameter name."""

    def __init__(
        self,
        scoring: ScoringModel,
        validation: list[Row],
        moments: Callable[[], Tensors],
        end_of_turn: list[int],
        seed: int,
        drift: Tensors | None = None,
    ) -> None:
        """drift: exact values come with stability along it."""
        self.scoring, self.validation, self.moments, self.seed = scoring, validation, moments, seed
        self.end_of_turn, self.drift = end_of_turn, drift
        self.reference: ScoringModel | None = None

    def values(self, signal: Signal, rows: list[Row]) -> Values:
        """Values of `rows` under the direction of all validation rows."""
        return score(self.estimator(signal), rows)

    def estimator(self, signal: Signal):
        """What values batches at the current weights, under the direction of all validation rows."""
        if not signal.has_direction:
            return self._baseline(signal)
        return self._along(signal, mean_of(*self._gradients(signal, self.validation)))

    def direction(self, signal: Signal) -> Tensors:
        """That of all validation rows, preconditioned where the signal says so."""
        return self._scaled(signal, mean_of(*self._gradients(signal, self.validation)))

    def calibrated(self, signal: Signal, rows: list[Row], folds: int) -> tuple[Values, Values]:
        """(values of rows, values of the validation rows), each fold's under the direction of the other folds."""
        parts = [self.validation[fold::folds] for fold in range(folds)]
        sums = [self._gradients(signal, part) for part in parts]
        whole = mean_of([g for gs, _ in sums for g in gs], [w for _, ws in sums for w in ws])
        found = score(self._along(signal, whole), rows)
        held_out = []
        for fold, part in enumerate(parts):
            others = [s for other, s in enumerate(sums) if other != fold]
            direction = mean_of([g for gs, _ in others for g in gs], [w for _, ws in others for w in ws])
            held_out.append(score(self._along(signal, direction), part))
        return found, joined(held_out)

    def _gradients(self, signal: Signal, rows: list[Row]) -> tuple[list[Tensors], list[float]]:
        """Summed gradient of `rows` and its weight (per row of unit length where normalised by sequence)."""
        class_weights = None
        if signal.without_end_of_turn:
            class_weights = torch.ones(self.scoring.model.config.vocab_size)
            class_weights[self.end_of_turn] = 0.0
        options = GradientOptions(
            signal.parameters,
            signal.normalization,
            "response" if signal.name == "value_propagation" else "all",
            class_weights,
        )
        total: Tensors = {}
        weight = 0.0
        by_row = signal.normalization == "sequence"
        for batch in [batch_of([row]) for row in rows] if by_row else [batch for _, batch in batches_of(rows)]:
            gradient, count = batch_gradient(self.scoring, batch, options)
            if by_row:
                length = torch.sqrt(sum(g.square().sum() for g in gradient.values()))
                gradient, count = {name: g / length for name, g in gradient.items()}, 1.0
            add_into(total, gradient)
            weight += count
        return [total], [weight]

    def _along(self, signal: Signal, direction: Tensors):
        direction = self._scaled(signal, direction)
        if signal.name == "exact":
            drift = self.drift and self._scaled(signal, self.drift)
            return Exact(self.scoring, signal.parameters, direction, drift)
        return ValuePropagation(self.scoring, signal.parameters, direction)

    def _scaled(self, signal: Signal, tensors: Tensors) -> Tensors:
        if signal.preconditioner == "none":
            return tensors
        scale = adam_scale(self.moments())
        return {name: tensor * scale[name] for name, tensor in tensors.items()}

    def _baseline(self, signal: Signal):
        if signal.name == "random":
            return lambda batch: _RandomValues(random_values(batch, self.seed))
        if signal.name == "excess_loss" and self.reference is None:
            self.reference = adapted_reference(self.scoring, self.validation)
        return Baseline(self.scoring, signal.name, self.reference if signal.name == "excess_loss" else None)


class _RandomValues:
    """No forward pass: random drops cost nothing."""

    def __init__(self, values: torch.Tensor) -> None:
        self.adaptation, self.stability, self.logprobs = values, torch.zeros_like(values), torch.zeros_like(values)


def mean_of(gradients: list[Tensors], weights: list[float]) -> Tensors:
    total: Tensors = {}
    for gradient in gradients:
        add_into(total, gradient)
    return {name: tensor / sum(weights) for name, tensor in total.items()}


def score(estimator, rows: list[Row]) -> Values:
    """Runs an estimator over rows in batches of similar length."""
    by_row: dict[int, np.ndarray] = {}  # 3 x tokens of the row: adaptation, logprobs, stability
    for group, batch in batches_of(rows):
        found = estimator(batch)
        streams = torch.stack([found.adaptation, found.logprobs, found.stability], dim=1).double()
        by_row |= {i: part.cpu().numpy().T for i, part in zip(group, batch.split(streams), strict=True)}
    order = range(len(rows))
    offsets = np.concatenate([[0], np.cumsum([by_row[i].shape[1] for i in order])]).astype(np.int64)
    adaptation, logprobs, stability = np.concatenate([by_row[i] for i in order], axis=1)
    return Values(adaptation, -logprobs, offsets, stability)


def joined(parts: list[Values]) -> Values:
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    return Values(
        np.concatenate([part.value for part in parts]),
        np.concatenate([part.loss for part in parts]),
        np.concatenate([[0], np.cumsum(counts)]),
    )


def adapted_reference(scoring: ScoringModel, rows: list[Row], steps: int = 8, rate: float = 5e-5) -> ScoringModel:
    """The reference of excess_loss (Rho-1): the model after a few Adam steps on the validation rows."""
    reference = copy.deepcopy(scoring.model)
    tuned = ScoringModel(reference, type(scoring.head)(reference))
    weights = {name: p.requires_grad_(True) for name, p in reference.named_parameters() if ".layers." in name}
    optimizer = torch.optim.Adam(weights.values(), lr=rate)
    for step in range(steps):
        batch = batch_of(rows[step % 3 :: 3])
        optimizer.zero_grad()
        backward(tuned, batch, None)
        optimizer.step()
    reference.requires_grad_(False)
    return tuned


Weigh = Callable[[torch.Tensor], torch.Tensor]  # losses N -> weights N


def backward(scoring: ScoringModel, batch, weights: torch.Tensor | Weigh | None) -> float:
    """Gradient of the weighted mean loss of a batch, added to .grad; the head is frozen. Returns that loss.

    Weights may depend on the losses of the same forward pass.
    """
    hidden = decoder(scoring.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    predicting = hidden[batch.predicting]
    if callable(weights):
        return _backward_weighed(scoring, batch, predicting, weights)
    weights = predicting.new_ones(len(predicting)) if weights is None else weights.to(predicting.device)
    used = weights > 0
    if not used.any():
        return float("nan")
    head = scoring.head(predicting.detach()[used], batch.targets[used], gradient=True)
    scale = weights[used] / weights.sum()
    upstream = torch.zeros_like(predicting)
    upstream[used] = head.hidden_gradient * scale[:, None]
    predicting.backward(upstream)
    return float((head.losses * scale).sum())


def _backward_weighed(scoring: ScoringModel, batch, predicting: torch.Tensor, weigh: Weigh) -> float:
    head = scoring.head(predicting.detach(), batch.targets, gradient=True)
    weights = weigh(head.losses)
    total = weights.sum()
    if not total:
        return float("nan")
    predicting.backward(head.hidden_gradient * (weights / total)[:, None])
    return float((head.losses * weights).sum() / total)
