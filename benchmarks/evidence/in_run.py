"""Rows judged in the step that trains on them."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from alphatoken.in_run import InRun
from benchmarks.evidence.costs import Clock, Costs
from benchmarks.evidence.data import Row, batch_of
from benchmarks.evidence.rules import Rule, held_out_order, weight_of
from benchmarks.evidence.signals import Scorer, Signal, Values, score

if TYPE_CHECKING:
    from benchmarks.evidence.runs import Lab

Weights = dict[int, np.ndarray]  # row_id: weight of each response token


class InRunJudge:
    """Direction and bounds are those of the step at which it is made.

    Where values come from: a rule by loss reads the losses of the training forward pass; a shared rule takes values
    from that pass too, as `train --in-run` does; else values need a pass of their own, counted as scoring.
    """

    def __init__(self, lab: "Lab", rule: Rule, scorer: Scorer, costs: Costs) -> None:
        self.lab, self.rule, self.scorer, self.costs = lab, rule, scorer, costs
        self.estimator, self.in_run = None, None
        self.found: Weights = {}  # of the last step
        with Clock() as clock:
            self.held_out = None
            if rule.is_calibrated:
                self.held_out = scorer.values(Signal("loss"), held_out_order(scorer.validation))
            if rule.shared:
                self.in_run = InRun(lab.scoring.model, rule.signal.name, rule.signal.parameters)
                self.in_run.set_direction(scorer.direction(rule.signal))
            elif rule.signal != Signal("loss"):
                self.estimator = scorer.estimator(rule.signal)
        costs.add("score", clock.cpu, clock.wall)

    def train(self, part: list[Row]) -> Weights:
        """Takes the step; returns the weights that it found."""
        if self.estimator is not None:
            with Clock() as clock:
                self.found = self._weights(part, score(self.estimator, part))
            self.costs.add("score", clock.cpu, clock.wall)
        with Clock() as clock:
            if self.in_run is not None:
                self.lab.trainer.update(lambda: self._shared_gradient(part))
            elif self.estimator is None:
                self.lab.trainer.step(part, lambda losses: self._weigh(part, losses, losses))
            else:
                self.lab.trainer.step(part, [weight_of(row, self.found) for row in part])
        self.costs.add("train", clock.cpu, clock.wall)
        return self.found

    def _shared_gradient(self, part: list[Row]) -> float:
        """One forward pass for values and training."""
        forward = self.in_run.forward(batch_of(part))
        losses = forward.losses
        weights = self._weigh(part, losses.detach(), forward.values)
        total = weights.sum()
        if not total:
            return float("nan")
        loss = (losses * weights).sum() / total
        loss.backward()
        return float(loss.detach())

    def _weigh(self, part: list[Row], losses: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Weights N of a step from what its forward pass found; kept in `found`."""
        offsets = np.concatenate([[0], np.cumsum([sum(row.response_mask) for row in part])])
        self.found = self._weights(part, Values(values.double().cpu().numpy(), losses.double().cpu().numpy(), offsets))
        return torch.cat([weight_of(row, self.found) for row in part]).to(losses)

    def _weights(self, part: list[Row], values: Values) -> Weights:
        found = self.lab.weights_by_row(self.rule, self.scorer, part, values, self.held_out)
        return {row_id: weights for row_id, weights in found.items() if row_id >= 0}
