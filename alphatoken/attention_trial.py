"""Whether attention's forward-mode tangent comes from the Triton kernel: where it agrees with PyTorch and is faster.

Per dtype, head width and length (to a power of two) the first call on a GPU runs both, compares and times them. A
kernel that does not compile, disagrees or is slower is not used, and the log says which. Both round in their own way,
so values of two machines may differ by as much as those of two batches do.
"""

import importlib.util
import logging
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from alphatoken.readers import first_line

if TYPE_CHECKING:
    from alphatoken.attention import AttentionInputs

logger = logging.getLogger(__name__)

BLOCKS = {16: 64, 32: 64, 64: 64, 128: 32}  # head width -> queries and keys of a block of the kernel
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest element
RUNS = 3

Attend = Callable[["AttentionInputs"], torch.Tensor]  # dual numbers to dual numbers, BHTD
Parts = tuple[torch.Tensor, torch.Tensor]  # a dual number's


def attend_with_tangent(inputs: "AttentionInputs", blocks: Attend) -> torch.Tensor:
    """BHTD with a tangent. blocks: what does it in PyTorch."""
    return (by_kernel if _can_run(inputs) and _is_better(inputs, blocks) else blocks)(inputs)


def by_kernel(inputs: "AttentionInputs") -> torch.Tensor:
    """The kernel on dual numbers; a missing tangent is zero."""
    from alphatoken import attention_kernel

    parts = [forward_ad.unpack_dual(x) for x in (inputs.query, inputs.key, inputs.value)]
    primals = [part.primal for part in parts]
    tangents = [torch.zeros_like(part.primal) if part.tangent is None else part.tangent for part in parts]
    return forward_ad.make_dual(*attention_kernel.attend(primals, tangents, inputs.scaling))


def _can_run(inputs: "AttentionInputs") -> bool:
    plain = inputs.mask is None and inputs.softcap is None and inputs.sinks is None and not inputs.cached
    width = inputs.query.shape[-1]
    return (
        plain
        and inputs.query.is_cuda
        and width == inputs.value.shape[-1]
        and width in BLOCKS
        and inputs.query.dtype in TOLERANCE
        and _has_triton()
        and not (torch.is_grad_enabled() and inputs.query.requires_grad)  # in-run: the tangent rides on a graph
        and not torch._C._functorch.is_functorch_wrapped_tensor(inputs.query)  # several targets: a batch of tangents
    )


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


_verdicts: dict[tuple, bool] = {}


def _is_better(inputs: "AttentionInputs", blocks: Attend) -> bool:
    *_, length, width = inputs.query.shape
    case = (inputs.query.device, inputs.query.dtype, width, length.bit_length())
    if case not in _verdicts:
        _verdicts[case] = _trial(inputs, blocks)
    return _verdicts[case]


def _trial(inputs: "AttentionInputs", blocks: Attend) -> bool:
    shape = "heads of {}, {} positions, {}".format(*inputs.query.shape[:1:-1], inputs.query.dtype)
    try:
        seconds, found = _timed(by_kernel, inputs)
    except Exception as error:  # whatever a compiler raises on a machine that nobody has tried
        logger.warning("attention's Triton kernel does not run here, PyTorch's code does (%s)", first_line(error))
        return False
    usual, expected = _timed(blocks, inputs)
    limit = TOLERANCE[inputs.query.dtype]
    if not all(_differ(x, y) <= limit for x, y in zip(found, expected, strict=True)):
        logger.warning("attention's Triton kernel is wrong here (%s) and not used; please report it", shape)
        return False
    logger.info("attention's tangent, %s: Triton %.2g s, PyTorch %.2g s", shape, seconds, usual)
    return seconds < usual


def _timed(attend: Attend, inputs: "AttentionInputs") -> tuple[float, Parts]:
    """(the quickest of some runs, in seconds, (output, its tangent)); the first run compiles."""
    dual = forward_ad.unpack_dual(attend(inputs))
    taken = []
    for _ in range(RUNS):
        _synchronize(inputs)
        started = time.perf_counter()
        attend(inputs)
        _synchronize(inputs)
        taken.append(time.perf_counter() - started)
    assert dual.tangent is not None
    return min(taken), (dual.primal, dual.tangent)


def _synchronize(inputs: "AttentionInputs") -> None:
    if inputs.query.is_cuda:
        torch.cuda.synchronize(inputs.query.device)


def _differ(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest element; infinity for a NaN."""
    difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30))
    return difference if difference == difference else float("inf")
