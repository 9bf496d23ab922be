"""Which rows a training run sees at which step, and which of its steps share a window of values.

The order depends on the seed and the epoch alone: trainer, scoring actors and a resumed run agree without talking.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

ALL_PLAIN = "all %d steps train on every token, since the first %d do: lower --plain-steps"


def epoch_order(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """Row indices in the order of an epoch."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@dataclass(frozen=True)
class Window:
    """Optimizer steps [start, stop) whose rows are valued together, with the weights of step `weights_step`."""

    start: int
    stop: int
    weights_step: int


@dataclass(frozen=True)
class Schedule:
    """A whole training run. Steps are optimizer steps, from 0."""

    num_rows: int
    rows_per_forward: int  # of all workers together
    accumulation: int
    epochs: float
    max_steps: int | None
    seed: int
    plain_steps: int  # before the first window
    refresh_every: int  # steps of a window
    overlap: bool = False  # weights of the window before
    generates: bool = False  # every step needs a window, for its pairs: plain steps are windows on every token

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(math.ceil(self.num_rows / self.rows_per_forward) / self.accumulation)

    @property
    def total_steps(self) -> int:
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch)

    @cached_property
    def windows(self) -> list[Window]:
        size, last = self.refresh_every, self.total_steps
        plain = range(0, min(self.plain_steps, last), size) if self.generates else ()
        starts = [*plain, *range(self.plain_steps, last, size)]
        back = size if self.overlap else 0
        found = []
        for start, stop in zip(starts, [*starts[1:], last], strict=False):
            # To value a window, the optimizer has to have taken a step: before, it has no moments to give away.
            earliest = 0 if start < self.plain_steps else min(1, self.plain_steps)
            found.append(Window(start, stop, max(earliest, start - back)))
        return found

    @property
    def is_all_plain(self) -> bool:
        """Whether the run ends before anything is valued."""
        return self.plain_steps >= self.total_steps

    def is_plain(self, window: Window) -> bool:
        """Whether the window is trained on whole."""
        return window.start < self.plain_steps

    def window_at(self, step: int) -> Window | None:
        """The window that `step` belongs to; None for a step without one."""
        return next((window for window in self.windows if window.start <= step < window.stop), None)

    def rows_of(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """(row indices, ascending and each once; the first step of the window that trains on each)."""
        rows, steps = [], []
        for step in range(window.start, window.stop):
            epoch, place = divmod(step, self.steps_per_epoch)
            size = self.rows_per_forward * self.accumulation
            part = epoch_order(self.num_rows, self.seed, epoch)[place * size : (place + 1) * size].numpy()
            rows.append(part)
            steps.append(np.full(len(part), step))
        unique, first = np.unique(np.concatenate(rows), return_index=True)
        return unique, np.concatenate(steps)[first]
