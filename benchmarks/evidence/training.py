"""The training loop: AdamW, a batch of rows per step, and weights per response token that a rule may set."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from alphatoken.direction import Tensors
from alphatoken.model import ScoringModel
from benchmarks.evidence.data import Row, batch_of
from benchmarks.evidence.signals import Weigh, backward
from benchmarks.evidence.suffix import trained_parameters


@dataclass(frozen=True)
class Training:
    """What all runs share."""

    rate: float = 5e-5
    rows_per_step: int = 4
    rise: int = 4  # steps until the full rate
    betas: tuple[float, float] = (0.9, 0.999)

    def rate_at(self, step: int) -> float:
        """The rate of a step, from 0."""
        return self.rate * min(1.0, (step + 1) / self.rise)


@dataclass(frozen=True)
class FallingRate(Training):
    """The rate falls in a line, to zero behind the last of `fall` steps."""

    fall: int = 48

    def rate_at(self, step: int) -> float:
        return super().rate_at(step) * max(0.0, 1.0 - step / self.fall)


class Trainer:
    """A model in training. `state` and `restore` let runs share their first steps."""

    def __init__(self, scoring: ScoringModel, settings: Training) -> None:
        self.scoring, self.settings = scoring, settings
        self.parameters = trained_parameters(scoring)
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.reset()

    def reset(self) -> None:
        """Back to the first weights and a fresh optimizer."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.start[name])
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.settings.rate, betas=self.settings.betas, weight_decay=0.0
        )
        self.steps = 0

    def step(self, rows: list[Row], weights: list[torch.Tensor] | Weigh | None = None) -> float:
        """One step on `rows`; weights: for every row one weight per response token, or what finds them from the
        losses of the step's own forward pass. Returns the loss.
        """
        joined = torch.cat(weights) if isinstance(weights, list) else weights
        return self.update(lambda: backward(self.scoring, batch_of(rows), joined))

    def update(self, add_gradient: Callable[[], float]) -> float:
        """One optimizer step on the gradient that `add_gradient` leaves in .grad; returns what that returns."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer.zero_grad()
        loss = add_gradient()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        self.steps += 1
        return loss

    def moments(self) -> Tensors:
        """AdamW's second moments with its bias correction, by parameter name."""
        beta = self.settings.betas[1]
        return {
            self.names[id(p)]: state["exp_avg_sq"] / (1 - beta ** int(state["step"]))
            for p, state in self.optimizer.state.items()
        }

    def state(self) -> dict:
        weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        optimizer = {
            self.names[id(p)]: {key: value.clone() for key, value in state.items()}
            for p, state in self.optimizer.state.items()
        }
        return {"weights": weights, "optimizer": optimizer, "steps": self.steps}

    def restore(self, state: dict) -> None:
        self.reset()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
        for name, parameter in self.parameters.items():
            if name in state["optimizer"]:
                self.optimizer.state[parameter] = {k: v.clone() for k, v in state["optimizer"][name].items()}
        self.steps = state["steps"]
