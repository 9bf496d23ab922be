"""A trainer whose rows get their masks window by window, while it runs.

At the start of a window it gives its weights away, waits until the window is valued, and trains on the masks that come
back. Plain steps train on every response token. Checkpoints are made where windows begin, so a resumed run asks for
the same windows with the same weights.
"""

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import ray
import torch
from transformers import TrainerCallback

from alphatoken import storage
from alphatoken.rounds_config import RoundsConfig
from alphatoken.schedule import Schedule, Window
from alphatoken.schema import BRANCHES, IGNORE_INDEX
from pipelines.board import ask
from pipelines.moments import moment_states, without_bias
from pipelines.train_data import FILLER, Rows, RowsWithFillers
from pipelines.trainers import MaskedDPOTrainer, MaskedSFTTrainer
from pipelines.window_scorer import Snapshot

WINDOW_COLUMNS = {
    "sft": ["row_index", "input_ids", "response_mask", "labels"],
    "dpo": ["row_index", "prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask"],
}
logger = logging.getLogger(__name__)

LORA_PREFIX, LORA_BASE = "base_model.model.", ".base_layer."


@dataclass(frozen=True)
class Live:
    """A run's connection to the actors that value its data."""

    board: Any  # actor handle of pipelines/board.py
    schedule: Schedule


class LiveRows(RowsWithFillers):
    """Rows of the data by index, with the masks of the current window. A row that the window left out is a filler."""

    def __init__(self, rows: datasets.Dataset) -> None:
        super().__init__(rows)
        self.table: pa.Table | None = None
        self.places: dict[int, int] = {}

    def use(self, table: pa.Table | None) -> None:
        """Masked rows of a window. Before the first, every response token counts."""
        self.table = table
        self.places = {} if table is None else {row: i for i, row in enumerate(table["row_index"].to_pylist())}

    def __getitems__(self, indices: list[int]) -> Rows:
        if self.table is None:
            return [_unmasked(row) for row in super().__getitems__(indices)]
        if not self.places:
            return [_unmasked(row) for row in super().__getitems__([FILLER] * len(indices))]
        here = self.table.take([self.places.get(index, 0) for index in indices]).to_pylist()
        return [row | {"filler": index not in self.places} for row, index in zip(here, indices, strict=True)]


def _unmasked(row: dict[str, Any]) -> dict[str, Any]:
    """Every response token counts. A prompt that has no pair yet can only be a filler, of any two responses."""
    if "input_ids" in row:
        pairs = zip(row["input_ids"], row["response_mask"], strict=True)
        return row | {"labels": [token if inside else IGNORE_INDEX for token, inside in pairs]}
    some = row["prompt_ids"][:1]
    row = {"chosen_ids": some, "rejected_ids": some} | row
    return row | {f"{branch}_mask": [True] * len(row[f"{branch}_ids"]) for branch in BRANCHES}


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the trainer stands behind it in the order of classes


class _LiveTrainer(_Trainer):
    """What both objectives share; goes before the masked trainer."""

    def __init__(self, *args: Any, live: Live, config: RoundsConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.live, self.config = live, config
        self.rows = LiveRows(self.train_dataset)
        self.window: Window | None = None
        self.weights_step = 0
        self.seconds = {"publish": 0.0, "wait": 0.0}
        self._begun = False
        self.add_callback(SaveBetweenWindows(self))

    def _rows(self, rows: datasets.Dataset) -> RowsWithFillers:
        return self.rows if rows is self.train_dataset else super()._rows(rows)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimizer step: before they are read, their masks have to be there."""
        self._begin_step(self.state.global_step)
        return super().get_batch_samples(*args, **kwargs)

    def _begin_step(self, step: int) -> None:
        window = self.live.schedule.window_at(step)
        if not self._begun or any(step == other.weights_step for other in self.live.schedule.windows):
            self._publish(step)
        self._begun = True
        if window is None:
            return
        if window != self.window:
            summary = self._wait(window)
            columns = WINDOW_COLUMNS[self.config.objective]
            tables = [storage.read_table(shard, columns) for shard in summary["shards"]]
            self.rows.use(pa.concat_tables(tables))
            self.window, self.weights_step = window, summary["weights_step"]
        age = step - self.weights_step
        if self.config.max_staleness is not None and age > self.config.max_staleness:
            raise RuntimeError(f"step {step} would train on values of {age} steps ago")
        self._metrics["train"]["values_age"].append(float(age))

    def _wait(self, window: Window) -> dict:
        started = time.monotonic()
        summary = ask(self.live.board.window.remote(window.start))
        self.seconds["wait"] += time.monotonic() - started
        return summary

    def _publish(self, step: int) -> None:
        """Give the weights away if a window that is not finished needs them."""
        ahead = [w for w in self.live.schedule.windows if w.weights_step <= step <= w.start]
        if not any(not ask(self.live.board.is_finished.remote(window.start)) for window in ahead):
            return
        started = time.monotonic()
        weights = _plain_weights(self.accelerator.unwrap_model(self.model), self.accelerator.get_state_dict(self.model))
        moments = self._moments()
        if self.is_world_process_zero():
            there = {name: without_bias(state, self.optimizer).cpu() for name, state in moments.items()}
            reference = ray.put(Snapshot(step, weights, there))
            ask(self.live.board.publish.remote(step, [reference]))
        self.seconds["publish"] += time.monotonic() - started

    def _moments(self) -> dict[str, dict]:
        """The optimizer's states of the scored weights, with AdamW's second moments. UserError on every worker where
        they have none.
        """
        if not self.config.uses_moments or not self.state.global_step:  # nothing is valued before a step
            return {}
        states = moment_states(self.model, self.optimizer, self.config.scored_parameters)
        if states is None:
            logger.warning("every step so far was skipped, so the direction has no preconditioner yet")
        return states or {}

    def wait_for_next(self, step: int) -> None:
        """Before a checkpoint at `step`: a window that was valued with weights that are gone has to be on disk."""
        window = self.live.schedule.window_at(step) if step < self.live.schedule.total_steps else None
        if window is not None and window.weights_step < step:
            self._wait(window)

    def check_masks(self) -> None:
        """They come with the windows, whose rows carry them."""


class LiveSFTTrainer(_LiveTrainer, MaskedSFTTrainer):
    """SFT on windows of masked rows."""


class LiveDPOTrainer(_LiveTrainer, MaskedDPOTrainer):
    """DPO on windows of masked pairs, from the data or generated for the window."""


class SaveBetweenWindows(TrainerCallback):
    """Checkpoints where a window begins, at least `checkpoint_steps` apart."""

    def __init__(self, trainer: _LiveTrainer) -> None:
        self.trainer, self.saved = trainer, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        step, schedule = state.global_step, self.trainer.live.schedule
        window = schedule.window_at(step) if step < schedule.total_steps else None
        begins = window is not None and window.start == step
        if begins and step - self.saved >= self.trainer.config.checkpoint_steps:
            self.trainer.wait_for_next(step)
            self.saved = step
            control.should_save = True
        return control


def _plain_weights(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names of the model itself: of a LoRA model, those with the adapter merged into them."""
    if not hasattr(model, "merge_adapter"):
        names = {name for name, _ in model.named_parameters()}
        return {name: tensor.detach().cpu() for name, tensor in state.items() if name in names}
    model.merge_adapter()
    try:
        merged = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if ".lora_" not in name}
    finally:
        model.unmerge_adapter()
    return {name.removeprefix(LORA_PREFIX).replace(LORA_BASE, "."): tensor for name, tensor in merged.items()}
