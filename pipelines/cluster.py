"""Where Ray runs: the cluster that is already there, else a private one on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from alphatoken.errors import UserError

LOCAL_CPUS = 4  # logical: Ray Data needs a few slots for its stages to overlap, also on a small machine

logger = logging.getLogger(__name__)


def connect(num_cpus: int | None = None) -> None:
    """Initialise Ray unless it is: at RAY_ADDRESS if that is set, else locally with `num_cpus` logical CPUs."""
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            logger.info("connecting to Ray at %s", os.environ["RAY_ADDRESS"])
            ray.init(address=os.environ["RAY_ADDRESS"], logging_level=logging.WARNING)
        else:
            _start_local(num_cpus or max(os.cpu_count() or 1, LOCAL_CPUS))
    _quiet_ray_data()


def _start_local(num_cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's default of hiding GPUs from tasks that ask for none changes soon; say which one is meant.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)


def _quiet_ray_data() -> None:
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    DataContext.get_current().print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


@contextmanager
def user_errors() -> Iterator[None]:
    """A UserError raised in a Ray task comes out as itself, without Ray's wrapping and remote traceback."""
    try:
        yield
    except RayError as error:
        cause: BaseException | None = error
        while cause is not None:
            inner = getattr(cause, "cause", None) or cause.__cause__
            if isinstance(inner, UserError) and not isinstance(inner, RayError):
                raise inner from None
            cause = inner
        raise
