"""Which tokens of an optimizer step are trained on, in-run: by their share of the step, or by bounds.

N response tokens of a micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from alphatoken.batching import Batch
from alphatoken.in_run import keep_by_quantile
from alphatoken.suspects import Bounds, TokenLosses, token_losses


@dataclass(frozen=True)
class Judged:
    """A micro-batch and what is known of its tokens."""

    batch: Batch
    losses: torch.Tensor  # N
    values: torch.Tensor | None  # N; None: there is no direction
    branches: torch.Tensor  # N int: tokens of a branch share a threshold


def keep_all(judged: list[Judged]) -> list[torch.Tensor]:
    return [torch.ones_like(part.losses, dtype=torch.bool) for part in judged]


def keep_share(
    judged: list[Judged], keep_fraction: float, everyones: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """The highest values of the step. `everyones` gathers the values of all workers."""
    rows, first = [], 0
    for part in judged:
        rows.append(part.batch.predicting[0] + first)
        first += len(part.batch.input_ids)
    values = torch.cat([cast(torch.Tensor, part.values) for part in judged])
    branches = torch.cat([part.branches for part in judged])
    keep = keep_by_quantile(values, torch.cat(rows), branches, keep_fraction, everyones)
    return list(keep.split([part.batch.num_response_tokens for part in judged]))


def keep_unsuspected(
    judged: list[Judged],
    validation: TokenLosses,
    class_of: torch.Tensor,
    everyones: Callable[[TokenLosses], TokenLosses],
) -> list[torch.Tensor]:
    """Tokens within the bounds of the step. class_of: V, class of each token id. `everyones` joins those of all
    workers.
    """
    parts = [token_losses(part.batch, part.losses, class_of) for part in judged]
    bounds = Bounds.of(validation, everyones(TokenLosses.joined(parts)))
    masks = []
    for part, found in zip(judged, parts, strict=True):
        values = None if part.values is None else part.values.cpu().numpy()
        masks.append(torch.from_numpy(bounds.keep(found, values)).to(part.losses.device))
    return masks
