"""Turns at a device: one block computes while others are read or written.

An actor with a GPU is called with a block while another one's rows are still being written. Both run in threads of
their own; what computes takes turns.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """One at a time, and for how long nobody had a turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_since = time.monotonic()

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Waits for the others. Gives the seconds for which nobody had a turn before this one."""
        with self._lock:
            idle = time.monotonic() - self._free_since
            try:
                yield idle
            finally:
                self._free_since = time.monotonic()
