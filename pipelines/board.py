"""Where trainer and scoring actors meet: weights of the trainer one way, valued windows the other.

Weights lie in Ray's object store; the board holds references to them. It keeps no more than what is still wanted.
"""

import asyncio
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Board:
    """`done`: windows (by first step) that an earlier attempt has finished, and what it said of them."""

    def __init__(self, done: dict[int, dict]) -> None:
        self._windows = dict(done)
        self._weights: dict[int, list] = {}  # step -> [reference]; in a list, so that Ray does not fetch it
        self._failure: Exception | None = None
        self._changed = asyncio.Condition()

    async def publish(self, step: int, reference: list) -> None:
        """The trainer's weights before step `step`."""
        async with self._changed:
            self._weights[step] = reference
            self._changed.notify_all()

    async def weights(self, at_least: int) -> tuple[int, list]:
        """(step, [reference]) of the newest weights, once there are some of step `at_least` or later."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or any(step >= at_least for step in self._weights))
            self._raise_failure()
            newest = max(self._weights)
            for step in [step for step in self._weights if step < newest]:
                del self._weights[step]
            return newest, self._weights[newest]

    async def forget(self, step: int) -> None:
        """Weights whose owner has died."""
        async with self._changed:
            self._weights.pop(step, None)

    async def finish(self, start: int, result: dict) -> None:
        """The window from step `start` on is valued and masked."""
        async with self._changed:
            self._windows[start] = result
            self._changed.notify_all()

    async def window(self, start: int) -> dict:
        """What `finish` said, once it has."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or start in self._windows)
            self._raise_failure()
            return self._windows[start]

    async def is_finished(self, start: int) -> bool:
        return start in self._windows

    async def fail(self, error: Exception) -> None:
        """Nobody waits for what will not come."""
        async with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure


def ask(call: Any) -> Any:
    """The answer of a board's method."""
    return ray.get(call)
