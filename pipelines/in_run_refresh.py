"""What in-run values and masks are measured against, kept fresh: direction, drift, losses of validation rows."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from alphatoken import direction as directions
from alphatoken.batching import Batch
from alphatoken.in_run import InRun
from alphatoken.schedule import ALL_PLAIN
from alphatoken.suspects import TokenLosses
from alphatoken.train_config import BY_LOSS, BY_VALUE
from pipelines.moments import moment_states, without_bias

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InRunPlan:
    """What decides on values and masks."""

    estimator: str
    keep_fraction: float
    refresh_every: int  # optimizer steps between directions
    plain_steps: int  # optimizer steps before the first mask
    options: directions.GradientOptions
    validation: list[Batch]  # this worker's share
    rule: str = "share"  # or suspect, surprising
    window: int = 32
    preconditioner: str = "none"
    stability_weight: float = 0.0
    fisher: directions.Tensors | None = None
    reference_weights: directions.Tensors | None = None  # where drift is measured from
    class_of: torch.Tensor | None = None  # V: class of each token id; for bounds


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the trainer stands behind it in the order of classes


class Refreshing(_Trainer):
    """A trainer's part that makes them anew every `plan.refresh_every` steps. Needs `model` and `plan`."""

    in_run: InRun
    plan: InRunPlan

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._direction: directions.Tensors | None = None  # G, preconditioned
        self._scale: directions.Tensors = {}
        self._known: TokenLosses | None = None  # of the validation rows: what bounds are made from
        self._refreshed_at = 0
        self.refreshes = 0

    def _begin_step(self) -> None:
        """Once per optimizer step: a new direction where one is due, the drift of the current weights always."""
        step, last = self.state.global_step, self.state.max_steps
        if not step and last <= self.plan.plain_steps and self.accelerator.is_main_process:
            logger.warning(ALL_PLAIN, last, self.plan.plain_steps)
        if step < self.plan.plain_steps:
            return
        # By the step's number: a run that went on from a checkpoint refreshes when the whole run would have.
        if not self._ready or (step - self.plan.plain_steps) % self.plan.refresh_every == 0:
            self._refresh()
        if self._direction is not None and (self.plan.fisher is not None or self._refreshed_at == step):
            self.in_run.set_direction(self._with_drift(self._direction))

    @property
    def _ready(self) -> bool:
        """Whether tokens can be judged."""
        by_value, by_bounds = self.plan.rule in BY_VALUE, self.plan.rule in BY_LOSS
        return not (by_value and self._direction is None) and not (by_bounds and self._known is None)

    def _refresh(self) -> None:
        if self.plan.rule in BY_VALUE:
            scale = self._adam_scale() if self.plan.preconditioner == "adam" else {}
            if scale is None:
                return  # the optimizer has not taken a step yet
            self._refresh_direction(scale)
        if self.plan.rule in BY_LOSS:
            assert self.plan.class_of is not None
            with self.accelerator.autocast():
                found = self.in_run.validation_losses(self.plan.validation, self.plan.class_of)
            self._known = TokenLosses.joined(gather_object([found]))
        self._refreshed_at = self.state.global_step
        self.refreshes += 1

    def _refresh_direction(self, scale: directions.Tensors) -> None:
        with self.accelerator.autocast():
            found = self.in_run.mean_gradient(self.plan.validation, self.plan.options)
        weight = torch.tensor(found.weight, device=self.accelerator.device, dtype=torch.float64)
        total = self.accelerator.reduce(weight, "sum").item()
        self._direction = {}
        for name, tensor in found.tensors.items():
            mean = self.accelerator.reduce(tensor * found.weight, "sum") / total
            self._direction[name] = mean * scale[name] if scale else mean
        self._scale = scale

    def _adam_scale(self) -> directions.Tensors | None:
        """What AdamW multiplies a gradient by, from the optimizer's own second moments; None before its first step."""
        states = moment_states(self.model, self.optimizer, self.plan.options.parameters)
        if states is None:
            return None
        return directions.adam_scale({name: without_bias(state, self.optimizer) for name, state in states.items()})

    def _with_drift(self, direction: directions.Tensors) -> directions.Tensors:
        """G + lambda D, both preconditioned alike."""
        if self.plan.fisher is None:
            return direction
        assert self.plan.reference_weights is not None
        weights = dict(self.in_run.scoring.model.named_parameters())
        drift = directions.drift(weights, self.plan.reference_weights, self.plan.fisher)
        weight = self.plan.stability_weight
        return {
            name: tensor + weight * (drift[name] * self._scale[name] if self._scale else drift[name])
            for name, tensor in direction.items()
        }
