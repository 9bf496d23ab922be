"""Rows as 8-bit floats, each over a scale of its own, in one Triton kernel that reads them once.

Each program takes a row, keeps it, and divides as PyTorch does, so both give the same bits. Not run on a GPU yet: on
trial there (`kernel_trial.py`).
"""

import torch
import triton
import triton.language as tl

from alphatoken.float8 import FLOAT8, SHARE, SMALLEST_SCALE

EVEN = tl.constexpr(1.5 * 2**23)  # float32 numbers from here on are whole


@triton.jit
def _rounded(x):
    """x to the nearest number of three bits of mantissa, or of the smallest exponent, -6; to even where two are.

    Nothing is left to round where it becomes an 8-bit float: Triton's interpreter does that wrong.
    """
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
    step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    return ((x / step + EVEN) - EVEN) * step


@triton.jit
def _scale(x, found, scales, width, share, smallest, WIDTH: tl.constexpr):
    """x, found: (rows, width) contiguous; scales: rows float32. WIDTH: the power of two from width on."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    values = tl.load(x + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0) * share, smallest)
    tl.store(scales + row, scale)
    rounded = _rounded(tl.div_rn(values, scale))
    tl.store(found + row * width + columns, rounded.to(tl.float8e4nv), mask=columns < width)


def scale_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `float8.scaled_in_steps`. x: (rows, d), float32 or bfloat16, contiguous; at least one row."""
    rows, width = x.shape
    found = torch.empty_like(x, dtype=FLOAT8)
    scales = x.new_empty(rows, 1, dtype=torch.float32)
    _scale[(rows,)](x, found, scales, width, SHARE, SMALLEST_SCALE, triton.next_power_of_2(width))
    return found, scales
