"""Rows to padded batches under a token budget.

B rows, T positions (padded to the longest row of the batch), N response tokens of the batch in row-major order.
Padding is on the right, where causal attention never looks, so no attention mask is needed and no value changes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from alphatoken.device_copies import to_device

MAX_PADDING = 0.03  # of the computed positions
SMALLEST_BATCH = 1 / 16  # of the token budget: below this, padding is cheaper than another batch


@dataclass(frozen=True)
class Batch:
    """One padded batch. A response token at position 0 has nothing to be predicted from and must not occur."""

    input_ids: torch.Tensor  # BT int64, padded on the right with 0
    response_mask: torch.Tensor  # BT bool, false on padding
    row_ids: torch.Tensor  # B int64

    def to(self, device: torch.device) -> "Batch":
        """There, with the places that its mask names: to find them on a GPU, the host would wait for all its work."""
        moved = Batch(to_device(self.input_ids, device), to_device(self.response_mask, device), self.row_ids)
        rows, positions = self.predicting
        moved.__dict__["predicting"] = to_device(rows, device), to_device(positions, device)
        for name in ("span_places", "targets"):
            moved.__dict__[name] = to_device(getattr(self, name), device)
        return moved

    @cached_property
    def predicting(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(row index N, position index N) of the positions that predict a response token: label index - 1."""
        rows, labels = self.response_mask[:, 1:].nonzero(as_tuple=True)
        return rows, labels

    @property
    def span(self) -> torch.Tensor:
        """BT bool: from each row's first predicting position to its last."""
        predicts = torch.zeros_like(self.response_mask)
        predicts[:, :-1] = self.response_mask[:, 1:]
        return (predicts.cumsum(1) > 0) & (predicts.flip(1).cumsum(1).flip(1) > 0)

    @cached_property
    def span_places(self) -> torch.Tensor:
        """int64: the positions of `span` among the B * T, flattened."""
        return self.span.flatten().nonzero().squeeze(1)

    @cached_property
    def targets(self) -> torch.Tensor:
        """N int64: the response tokens themselves."""
        return self.input_ids[:, 1:][self.response_mask[:, 1:]]

    @property
    def num_response_tokens(self) -> int:
        return len(self.targets)

    def split(self, per_token: torch.Tensor) -> list[torch.Tensor]:
        """Values of N tokens (the first dimension) in row-major order to one tensor per row, of its response tokens."""
        return list(per_token.split(self.response_mask[:, 1:].sum(1).tolist()))


def make_batch(
    input_ids: Sequence[Sequence[int]], response_masks: Sequence[Sequence[bool]], row_ids: Sequence[int] | None = None
) -> Batch:
    """Rows of unequal length to one right-padded batch, on the CPU.

    A response token at position 0 has nothing to be predicted from and is taken out of the mask.

    Raises:
        ValueError: a row's mask is not as long as its input_ids.
    """
    lengths = [len(row) for row in input_ids]
    shape = (len(lengths), max(lengths))
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for b, (row, row_mask) in enumerate(zip(input_ids, response_masks, strict=True)):
        if len(row) != len(row_mask):
            raise ValueError(f"row {b} has {len(row)} input_ids but {len(row_mask)} response_mask entries")
        ids[b, : len(row)] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        mask[b, : len(row)] = torch.as_tensor(np.asarray(row_mask, dtype=bool))
    mask[:, 0] = False
    numbers = list(range(len(lengths))) if row_ids is None else list(row_ids)
    return Batch(ids, mask, torch.as_tensor(numbers, dtype=torch.int64))


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row indices of each batch, rows of similar length together.

    longest row x rows <= batch_tokens (a single row may exceed it). A batch that is large enough to be efficient is
    also closed before its padding passes MAX_PADDING.
    """
    batch: list[int] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        computed = lengths[index] * (len(batch) + 1)  # sorted: the newest row is the longest
        padded = computed - used - lengths[index] > MAX_PADDING * computed
        if batch and (computed > batch_tokens or (padded and used >= SMALLEST_BATCH * batch_tokens)):
            yield batch
            batch, used = [], 0
        batch.append(index)
        used += lengths[index]
    if batch:
        yield batch


def split_evenly(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Indices of rows for each of `parts` workers: about equal sums of lengths, each row once, in ascending order."""
    bounds = np.cumsum(lengths) / max(1, int(np.sum(lengths)))  # share of all tokens up to and with each row
    part_of_row = np.minimum((bounds * parts - 1e-9).astype(np.int64), parts - 1)
    return [np.flatnonzero(part_of_row == part) for part in range(parts)]
