"""MASKED rows to batches: memory-mapped loading, an epoch's order, padding.

The order depends on the seed and the epoch alone, so a resumed run goes on with the rows that it had not seen. In the
last batch of an epoch a worker may have no row left; it gets a filler, which is masked whole and so adds nothing to
any sum or count. accelerate's own sharding would show it some row a second time.

B rows, T positions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from alphatoken import storage
from alphatoken.schedule import epoch_order
from alphatoken.schema import IGNORE_INDEX

FILLER = -1  # index of a row that is none
SFT_COLUMNS = ("input_ids", "labels", "response_mask")
DPO_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
REFERENCE_TOKENS = ("chosen_ref_logprobs", "rejected_ref_logprobs")  # per token, beside sums, as `score` writes them
WEIGHTS = "weights"

Rows = list[dict[str, Any]]
Batch = dict[str, torch.Tensor]


def load_rows(shards: list[str], columns: list[str]) -> datasets.Dataset:
    """The columns of Parquet shards as one memory-mapped data set; workers of a machine share its files."""
    return datasets.load_dataset("parquet", data_files=shards, split="train", columns=columns)


class EpochBatches(Sampler[list[int]]):
    """Row indices of one worker's micro-batches; over all workers an epoch has each row once.

    All workers get equally many micro-batches of equal size.
    """

    def __init__(
        self, num_rows: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.num_rows, self.batch_size, self.seed, self.shuffle = num_rows, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = epoch_order(self.num_rows, self.seed, self.epoch)
        order = shuffled if self.shuffle else torch.arange(self.num_rows)
        for rows in order.split(self.batch_size * self.world_size):
            share = math.ceil(len(rows) / self.world_size)
            mine = rows[self.rank :: self.world_size].tolist()
            yield mine + [FILLER] * (share - len(mine))


class RowsWithFillers(Dataset):
    """Rows by index; a FILLER is some row with `filler` true."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Rows:
        columns = self.rows[[max(index, 0) for index in indices]]
        found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [row | {"filler": index == FILLER} for row, index in zip(found, indices, strict=True)]


class EpochLoader(DataLoader):
    """transformers tells a loader the epoch by this method."""

    batch_sampler: EpochBatches

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


@dataclass(frozen=True)
class SFTCollator:
    """Rows of SFT_COLUMNS (and weights) to a batch, padded on the right.

    input_ids, attention_mask, labels (B, T) long; response_tokens (B,): tokens that a plain SFT would train on;
    weights (B, T) float where rows have them: then labels are -100 only where the weight is zero.
    """

    pad_token_id: int
    max_length: int | None = None
    use_weights: bool = True
    use_masks: bool = True  # False: evaluation, on every response token

    def __call__(self, rows: Rows) -> Batch:
        cut = slice(self.max_length)
        ids = [torch.tensor(row["input_ids"][cut], dtype=torch.long) for row in rows]
        inside = [torch.tensor(row["response_mask"][cut], dtype=torch.bool) & (not row.get("filler")) for row in rows]
        weights = [torch.tensor(row[WEIGHTS][cut]) * there for row, there in zip(rows, inside, strict=True)] if (
            self.use_masks and self.use_weights and WEIGHTS in rows[0]
        ) else None  # fmt: skip
        if weights is not None:
            kept = [weight > 0 for weight in weights]
        elif self.use_masks:
            kept = [(torch.tensor(row["labels"][cut]) != IGNORE_INDEX) & (not row.get("filler")) for row in rows]
        else:
            kept = inside
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(row) for row in ids], 0),
            "labels": _pad([row.where(keep, IGNORE_INDEX) for row, keep in zip(ids, kept, strict=True)], IGNORE_INDEX),
            "response_tokens": torch.stack([there[1:].sum() for there in inside]),  # nothing predicts the first
        }
        if weights is not None:
            batch[WEIGHTS] = _pad(weights, 0.0)
        return batch


@dataclass(frozen=True)
class DPOCollator:
    """Rows of DPO_COLUMNS to the batch of TRL's DPOTrainer (chosen rows, then rejected ones), and the masks.

    input_ids, attention_mask, completion_mask, kept_mask (2B, T); real_pairs (B,) bool; with `reference` also
    ref_chosen_logps, ref_rejected_logps (B,), from columns with a sum over the whole response or one number per token.
    Where a log-ratio covers kept tokens alone and masks are still to be made, also reference (2B, T), by position.
    """

    pad_token_id: int
    max_length: int | None = None
    reference: bool = False
    dpo_mask: str = "loss"
    use_masks: bool = True

    def __call__(self, rows: Rows) -> Batch:
        cut = slice(self.max_length)
        ids, inside, kept = [], [], []
        for side in ("chosen", "rejected"):
            for row in rows:
                prompt, response = row["prompt_ids"], row[f"{side}_ids"]
                real = not row.get("filler")
                mask = row[f"{side}_mask"] if self.use_masks else [True] * len(response)
                ids.append(torch.tensor((prompt + response)[cut], dtype=torch.long))
                inside.append(torch.tensor(([False] * len(prompt) + [real] * len(response))[cut]))
                kept.append(torch.tensor(([False] * len(prompt) + [real and bool(keep) for keep in mask])[cut]))
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(row) for row in ids], 0),
            "completion_mask": _pad([row.long() for row in inside], 0),
            "kept_mask": _pad(kept, False),
            "real_pairs": torch.tensor([not row.get("filler") for row in rows]),
        }
        if self.reference:
            for side in ("chosen", "rejected"):
                found = [self._reference(row, side) for row in rows]
                batch[f"ref_{side}_logps"] = torch.tensor(found, dtype=torch.float64)  # sums over long responses
            if self.dpo_mask == "ratio" and not self.use_masks:
                placed = [self._by_position(row, side) for side in ("chosen", "rejected") for row in rows]
                batch["reference"] = _pad(placed, 0.0)
        return batch

    def _reference(self, row: dict[str, Any], side: str) -> float:
        """The reference's log-probability of what the log-ratio covers."""
        stored = row.get(f"{side}_ref_logprobs", row[f"ref_{side}_logps"])
        if row.get("filler"):
            return 0.0
        if not isinstance(stored, list):
            return float(stored)
        left = None if self.max_length is None else max(self.max_length - len(row["prompt_ids"]), 0)
        mask = row[f"{side}_mask"] if self.use_masks and self.dpo_mask == "ratio" else [True] * len(stored)
        return float(sum(value for value, keep in zip(stored[:left], mask, strict=False) if keep))

    def _by_position(self, row: dict[str, Any], side: str) -> torch.Tensor:
        """The reference's log-probability of each response token where it stands, zero elsewhere."""
        stored = row.get(f"{side}_ref_logprobs", row[f"ref_{side}_logps"])
        placed = torch.tensor([0.0] * len(row["prompt_ids"]) + stored, dtype=torch.float64)[: self.max_length]
        return torch.zeros_like(placed) if row.get("filler") else placed


def _pad(rows: list[torch.Tensor], value: float | bool) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def columns_for(
    objective: str, available: list[str], use_weights: bool, reference: bool, masked: bool = True
) -> list[str]:
    """The columns that training reads."""
    if objective == "sft" and not masked:
        return ["input_ids", "response_mask"]
    if objective == "sft":
        return [*SFT_COLUMNS, *([WEIGHTS] if use_weights and WEIGHTS in available else [])]
    per_token = [name for name in REFERENCE_TOKENS if name in available]
    return [*DPO_COLUMNS, *([*REFERENCE_COLUMNS, *per_token] if reference else ())]


def data_shards(folder: str) -> list[str]:
    """The shards of a folder as `load_rows` takes them."""
    return storage.list_shards(folder)
