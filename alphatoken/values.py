"""What every estimator returns, and the interface behind which they all stand. N response tokens of a batch."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from alphatoken.batching import Batch


@dataclass(frozen=True)
class TokenValues:
    """Per response token, in row-major order of the batch, all float32 or wider.

    Positive adaptation: training on the token lowers the validation loss. Positive stability: it reduces drift.
    """

    adaptation: torch.Tensor  # N
    stability: torch.Tensor  # N
    logprobs: torch.Tensor  # N, natural log
    terms: dict[str, torch.Tensor] = field(default_factory=dict)  # the paper's four terms, each N


class Estimator(Protocol):
    """Values of a batch under one checkpoint. A value depends on its row alone, never on the batch around it."""

    def __call__(self, batch: Batch) -> TokenValues: ...
