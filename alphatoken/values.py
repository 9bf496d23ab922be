"""What every estimator returns, and the interface behind which they all stand. N response tokens of a batch."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from alphatoken.batching import Batch
from alphatoken.targets import ADAPTATION, target_column


@dataclass(frozen=True)
class TokenValues:
    """Per response token, in row-major order of the batch, all float32 or wider.

    Positive adaptation: training on the token lowers the validation loss. Positive stability: it reduces drift.
    """

    adaptation: torch.Tensor  # N
    stability: torch.Tensor  # N
    logprobs: torch.Tensor  # N, natural log
    terms: dict[str, torch.Tensor] = field(default_factory=dict)  # more columns, each N: the paper's terms, targets


@dataclass(frozen=True)
class Targets:
    """Several named directions to value along in one pass, each by parameter name. Adaptation is the sum over them."""

    directions: dict[str, dict[str, torch.Tensor]]  # by name of the target
    central_steps: dict[str, float | None] = field(default_factory=dict)  # see Exact; None or missing: looked for


def by_column(direction: "dict[str, torch.Tensor] | Targets") -> dict[str, dict[str, torch.Tensor]]:
    """Directions by the name of the column that their values become."""
    if isinstance(direction, Targets):
        return {target_column(name): tensors for name, tensors in direction.directions.items()}
    return {ADAPTATION: direction}


def adaptation_of(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(adaptation, columns of named targets) from adaptations by column; an ordinary run has no named target."""
    if ADAPTATION in values:
        return values[ADAPTATION], {}
    return torch.stack(list(values.values())).sum(0), values


class Estimator(Protocol):
    """Values of a batch under one checkpoint. A value depends on its row alone, never on the batch around it."""

    def __call__(self, batch: Batch) -> TokenValues: ...
