"""Progress of what Ray tasks do: they add to a counter, the driver looks at it while it waits for them."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

Item = TypeVar("Item")
Tick = Callable[[str, float], None]  # called in a task with (what is counted, how many more)
Phase = Callable[[str, float], None]  # called on the driver with (what is counted now, how many are done)

SECONDS = 0.5  # between looks


class _Tally:
    """What was counted last, and how many of it are done."""

    def __init__(self) -> None:
        self.what, self.done = "", 0.0

    def add(self, what: str, more: float) -> None:
        if what != self.what:
            self.what, self.done = what, 0.0
        self.done += more

    def read(self) -> tuple[str, float]:
        return self.what, self.done


Tally: Any = ray.remote(num_cpus=0)(_Tally)


def no_tick(what: str, more: float) -> None:
    """Where nobody looks."""


def tick_of(counter: Any) -> Tick:
    """For a task: adds to the counter, and does nothing where there is none."""
    if counter is None:
        return no_tick

    def tick(what: str, more: float) -> None:
        with suppress(RayError):  # work goes on where nobody can be told of it
            ray.get(counter.add.remote(what, more))

    return tick


def counted(items: Iterable[Item], tick: Tick, what: str, size: Callable[[Item], int]) -> Iterator[Item]:
    """The same items; each is counted when the next one is asked for, which is when it is done with."""
    for item in items:
        yield item
        tick(what, size(item))


def get_all(references: list, counter: Any, progress: Phase | None) -> list:
    """ray.get, with progress while it waits."""
    with following(counter, progress):
        return ray.get(references)


@contextmanager
def following(counter: Any, progress: Phase | None) -> Iterator[None]:
    """Calls `progress` now and then with what the counter says, while the body waits. Without them nothing happens."""
    if counter is None or progress is None:
        yield
        return

    def look() -> None:
        with suppress(RayError):
            what, number = ray.get(counter.read.remote())
            if what:
                progress(what, number)

    with repeating(look, SECONDS):
        yield
    look()


@contextmanager
def repeating(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `look` every so many seconds, in a thread, while the body runs."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(seconds):
            look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
