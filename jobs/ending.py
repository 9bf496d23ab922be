"""Why a job ended, in one line."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any


def sentence(result: Any, started: float) -> str:
    """Of a job that ended well. `started`: time.time() before it."""
    result = result if isinstance(result, dict) else {}
    if result.get("already_finished"):  # files of tensors do not say when
        return "already finished"
    created = result.get("created")
    if created and datetime.fromisoformat(created).timestamp() < int(started):  # written by an earlier run
        return f"already finished, at {created}"
    return f"finished in {time.time() - started:.1f} s"


def interrupted(by: str) -> str:
    return f"interrupted by {by}; run the same command again to go on"


@contextmanager
def by_signal() -> Iterator[None]:
    """SIGTERM (a job that is stopped, a machine that is taken away) raises SystemExit(SIGTERM), as Ray's handler does.

    Without a handler the process would be gone with no word and no cleaning up.
    """

    received: list[int] = []
    others = _running_ray()

    def stop(number: int, _frame: Any) -> None:
        received.append(number)
        sys.exit(number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    except SystemExit:
        if received:  # where Ray was waited for, it is SystemExit(1) by now
            ray = _running_ray()
            if ray and not others:
                ray.shutdown()  # what it still has to say comes before the last line
            raise SystemExit(signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _running_ray() -> Any:
    """Ray, if this process has begun with it; it is not imported for this."""
    ray = sys.modules.get("ray")
    return ray if ray and ray.is_initialized() else None
