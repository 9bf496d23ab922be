"""Where Ray runs: the cluster that is already there, else a private one on this machine."""

import ctypes
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from alphatoken.errors import UserError

LOCAL_CPUS = 4  # logical: Ray Data needs a few slots for its stages to overlap, also on a small machine

SLOTS = 3  # for tasks that read, encode and write beside the actors

MANY_DEATHS = 100  # of processes at the same work: notes lead the next one to the row (pipelines/poison.py)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h

REMOTE_USER_ERROR = re.compile(r"^\s*alphatoken\.errors\.UserError: (.+)$", re.MULTILINE)

logger = logging.getLogger(__name__)


def connect(num_cpus: int | None = None) -> None:
    """Initialise Ray unless it is: at RAY_ADDRESS if that is set, else locally with `num_cpus` logical CPUs."""
    if not ray.is_initialized():
        with _own_sigterm():
            if os.environ.get("RAY_ADDRESS"):
                logger.info("connecting to Ray at %s", os.environ["RAY_ADDRESS"])
                ray.init(address=os.environ["RAY_ADDRESS"], logging_level=logging.WARNING)
            else:
                _start_local(num_cpus or max(os.cpu_count() or 1, LOCAL_CPUS))
    _quiet_ray_data()


def room_for(actors: int, cpus: float) -> int:
    """Logical CPUs of a private Ray in which so many actors and the tasks beside them run at once."""
    return max(os.cpu_count() or 1, LOCAL_CPUS, math.ceil(actors * cpus) + SLOTS)


def check_gpus(option: str, number: int, each: float, taken: float = 0) -> None:
    """UserError where so many actors never fit, on a machine of its own: they would wait for ever. A cluster may grow.

    taken: GPUs that others hold at the same time.
    """
    if os.environ.get("RAY_ADDRESS") or not each:
        return
    there = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else torch.cuda.device_count()
    if number * each > there - taken:
        raise UserError(
            f"{option} {number} needs {number * each:g} GPUs, there are {max(0, there - taken):g} here for it; give "
            f"fewer, or less than {each:g} GPUs to each"
        )


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM did before stays: Ray's C++ code would print its stack and abort the process (exit code 134)."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():  # None: not set from Python
        signal.signal(signal.SIGTERM, before)


def _start_local(num_cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's default of hiding GPUs from tasks that ask for none changes soon; say which one is meant.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # says that tokens are on, its default
    with _packages_on_path():
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)


@contextmanager
def _packages_on_path() -> Iterator[None]:
    """Ray's workers inherit PYTHONPATH but not sys.path: `python jobs/x.py` from any folder needs ours there."""
    root, before = str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")
    if not root.endswith("-packages"):  # installed: found without help
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, before]))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _quiet_ray_data() -> None:
    from ray.data import DataContext

    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that the bars are off
    DataContext.get_current().enable_progress_bars = False
    DataContext.get_current().print_on_execution_start = False
    DataContext.get_current().issue_detectors_config.detectors = []  # advice on memory that is no user's to give
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off


def torch_threads(actors: int = 1, cpus_per_actor: float = 1) -> int:
    """Threads of an actor that computes on a CPU: the machine's cores shared out where all actors run on it.

    Ray's own default is the actor's logical CPUs, of which a small machine is given more than it has cores.
    """
    alone = not ray.is_initialized() or len([node for node in ray.nodes() if node["Alive"]]) == 1
    return max(1, (os.cpu_count() or 1) // actors if alone else int(cpus_per_actor))


def actor_pool(low: int, high: int, ahead: bool | None = None) -> Any:
    """Actors that call a class of ours in the thread that has made it; those that work ahead, in two threads.

    `ahead`: whether an actor is called with a block while it still writes the one before (the class takes turns at the
    device: pipelines/turns.py) and a third one waits there, so that a GPU need wait for neither rows nor storage. If
    False, an actor gets a block when it has done with the last: on CPUs there is nothing to gain, and the last blocks
    would wait at one actor while another is idle. None: one call at a time, and another block waits. A pool that grows
    always has blocks wait: Ray grows it by its queues.

    Ray Data would call it in another thread. OpenMP keeps a pool of threads for each, together more than there are
    cores, and then every parallel operation waits tens of microseconds for its threads to wake up.
    """
    from ray.data import ActorPoolStrategy

    calls = 2 if ahead else 1
    if low == high:
        in_flight = None if ahead is None else 3 if ahead else 1
        return ActorPoolStrategy(
            size=high, enable_true_multi_threading=True, max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=in_flight,
        )  # fmt: skip
    return ActorPoolStrategy(
        min_size=low, max_size=high, enable_true_multi_threading=True, max_concurrent_calls_per_actor=calls
    )


def prepare_worker(threads: int) -> None:
    """What a process does first that is about to load a model."""
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(threads)
    _keep_freed_memory()
    transformers_logging.disable_progress_bar()  # many actors would each draw one


def _keep_freed_memory() -> None:
    """Have malloc keep the memory of a batch's tensors for the next batch.

    By default it goes back to the system at every free, and the page faults of taking it again cost a tenth of the
    time of scoring on a CPU. One arena, since only the main one may keep large blocks. Elsewhere than with glibc this
    does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


@contextmanager
def user_errors() -> Iterator[None]:
    """A UserError raised in a Ray task or actor comes out as itself: one sentence, no remote traceback.

    Ray Data wraps what a task raises and the wrapper loses its cause on the way to the driver; the sentence survives
    only in the text of the remote traceback.
    """
    try:
        yield
    except RayError as error:
        found = REMOTE_USER_ERROR.findall(str(error))
        if found:
            raise UserError(found[-1]) from None
        raise
