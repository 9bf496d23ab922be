"""Whether a Triton kernel does a piece of work: where it agrees with PyTorch's code and is faster.

Per kernel, device, dtype and kind of shape the first call on a GPU runs both, compares and times them. A kernel that
does not compile, disagrees or is slower is not used, and the log says which. Both round in their own way, so values of
two machines may differ by as much as those of two batches do.
"""

import importlib.util
import logging
import time
from collections.abc import Callable, Hashable
from functools import cache
from typing import TypeVar

import torch

from alphatoken.errors import first_line

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest element, by dtype of the inputs
RUNS = 3

Result = TypeVar("Result", torch.Tensor, tuple[torch.Tensor, ...])

_verdicts: dict[Hashable, bool] = {}


def can_run(*inputs: torch.Tensor) -> bool:
    """Whether a kernel can take these at all: on a GPU, of one dtype that kernels are made for, Triton there."""
    dtype = inputs[0].dtype
    return dtype in TOLERANCE and all(x.is_cuda and x.dtype == dtype for x in inputs) and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def run_better(
    name: str, like: torch.Tensor, kind: tuple[int, ...], kernel: Callable[[], Result], usual: Callable[[], Result]
) -> Result:
    """What `kernel` or `usual` gives. name: what they compute. like: an input. kind: sizes that decide."""
    case = (name, like.device, like.dtype, kind)
    if case not in _verdicts:
        _verdicts[case] = _trial(name, like, kernel, usual)
    return (kernel if _verdicts[case] else usual)()


def _trial(name: str, like: torch.Tensor, kernel: Callable[[], Result], usual: Callable[[], Result]) -> bool:
    what = f"{name}, {'x'.join(map(str, like.shape))}, {like.dtype}"
    try:
        seconds, found = _timed(kernel, like.device)
    except Exception as error:  # whatever a compiler raises on a machine that nobody has tried
        logger.warning("the Triton kernel does not run here, PyTorch's code does: %s (%s)", what, first_line(error))
        return False
    usual_seconds, expected = _timed(usual, like.device)
    if not all(_differ(x, y) <= TOLERANCE[like.dtype] for x, y in zip(found, expected, strict=True)):
        logger.warning("the Triton kernel is wrong here and not used, please report it: %s", what)
        return False
    logger.info("%s: Triton %.2g s, PyTorch %.2g s", what, seconds, usual_seconds)
    return seconds < usual_seconds


def _timed(run: Callable[[], Result], device: torch.device) -> tuple[float, tuple[torch.Tensor, ...]]:
    """(the quickest of some runs, in seconds, what the first gave, which also compiles)."""
    found, taken = run(), []
    for _ in range(RUNS):
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken), (found,) if isinstance(found, torch.Tensor) else found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _differ(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest element; infinity for a NaN."""
    difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30))
    return difference if difference == difference else float("inf")
