"""Batches that cannot be computed.

One is halved until single rows are left that cannot. They are put aside with a reason: out of memory, or the error of
the computation. Other errors than memory are put down to rows only on evidence:

- some other row of the block could be computed: the failing ones are put aside;
- none could, and their errors, out of memory aside, are two or more of one type: a bug or a wrong set-up, the first
  is raised;
- none could otherwise (a block of one row, rows too long for the memory, errors of several types): two tokens of the
  shortest row are computed alone. If even they fail, that error is raised; else the rows are put aside.

A CUDA error other than out of memory is always raised: it leaves the device unusable for good rows too.
"""

import gc
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from alphatoken.errors import UserError, first_line

logger = logging.getLogger(__name__)

# What torch says on CPUs and what drivers say beside torch.OutOfMemoryError
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

Result = TypeVar("Result")


def with_halves(
    evaluate: Callable[[list[int]], Result], indices: list[int], errors: dict[int, Exception]
) -> Iterator[tuple[list[int], Result]]:
    """(row indices, results) of every part of a batch that can be computed; single rows that cannot go to `errors`."""
    waiting = [indices]
    while waiting:
        part = waiting.pop()
        try:
            result = evaluate(part)
        except UserError:
            raise
        except Exception as error:  # whatever a model or a kernel raises
            if is_device_broken(error):
                raise
            traceback.clear_frames(error.__traceback__)  # its frames hold the tensors that filled the memory
            failed = error
        else:
            yield part, result
            continue
        if is_out_of_memory(failed):
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(part) > 1:
                logger.warning("out of memory on a batch of %d rows, trying halves of it; a smaller --batch-tokens "
                               "saves the attempt", len(part))  # fmt: skip
        if len(part) == 1:
            errors[part[0]] = failed
        else:
            half = len(part) // 2
            waiting += [part[half:], part[:half]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once may help."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def is_device_broken(error: Exception) -> bool:
    """Whether the device may compute wrong numbers from now on."""
    broken = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return broken and not is_out_of_memory(error)


def check_set_up(errors: dict[int, Exception]) -> None:
    """Raises the first of the errors (by row or pair) where no row could be computed and several failed alike."""
    others = [error for error in errors.values() if not is_out_of_memory(error)]
    if len(others) > 1 and len({type(error) for error in others}) == 1:
        others[0].add_note(f"Every one of {len(errors)} rows failed like this: a bug or a wrong set-up, not the rows.")
        raise others[0]


def probe(compute: Callable[[], object], rows: int, device: torch.device) -> None:
    """Raises where not even two tokens can be computed, so that the rows are not to blame."""
    try:
        compute()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"None of {rows} rows can be scored, nor two tokens alone: out of memory on {device}. Free its memory, or "
            "score with fewer actors per machine, a smaller model or --dtype bfloat16."
        ) from error


def reason_of(error: Exception, length: int) -> str:
    if is_out_of_memory(error):
        return (
            f"out of memory with this row alone in its batch ({length} tokens): lower --max-length or score it on a "
            "device with more memory"
        )
    return f"the computation of this row failed ({type(error).__name__}: {first_line(error)})"
