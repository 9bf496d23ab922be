"""What a run costs, by purpose."""

import time
from dataclasses import dataclass, field

import torch


@dataclass
class Costs:
    """CPU and wall seconds by purpose. A first part that runs share is measured once and counted for each."""

    cpu: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "score": 0.0})
    wall: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "score": 0.0})

    def add(self, purpose: str, cpu: float, wall: float) -> None:
        self.cpu[purpose] += cpu
        self.wall[purpose] += wall

    def summary(self) -> dict[str, dict[str, float]]:
        """As a result has them."""
        parts = {"cpu_seconds": self.cpu, "wall_seconds": self.wall}
        return {name: {key: round(value, 2) for key, value in part.items()} for name, part in parts.items()}


class Clock:
    """CPU time does not count pauses of the machine; wall time does, and what a GPU does."""

    def __enter__(self) -> "Clock":
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.cpu, self.wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
