"""delta_n^T M h_n of every token in one Triton kernel: the product M h_n never reaches memory.

Each program takes a block of tokens and a block of M's rows, and leaves their part of the sum; the parts are added in
a fixed order. Not run on a GPU yet: on trial there (`kernel_trial.py`).

N tokens, D_in and D_out the widths of one linear.
"""

import torch
import triton
import triton.language as tl

TOKENS, OUT, IN = 64, 64, 32  # of a block


@triton.jit
def _contract(
    delta, matrix, h, parts, tokens, d_out, d_in, TOKENS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr
):  # fmt: skip
    """All tensors are contiguous; parts: (blocks of D_out, N) float32."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    outs = tl.program_id(1) * OUT + tl.arange(0, OUT)
    token, out = rows.to(tl.int64)[:, None], outs.to(tl.int64)[:, None]
    product = tl.zeros([TOKENS, OUT], tl.float32)
    for start in range(0, d_in, IN):
        ins = start + tl.arange(0, IN)[None]
        x = tl.load(h + token * d_in + ins, mask=(rows[:, None] < tokens) & (ins < d_in), other=0.0)
        m = tl.load(matrix + out * d_in + ins, mask=(outs[:, None] < d_out) & (ins < d_in), other=0.0)
        product += tl.dot(x, tl.trans(m), input_precision="ieee")
    inside = (rows[:, None] < tokens) & (outs[None] < d_out)
    d = tl.load(delta + token * d_out + outs[None], mask=inside, other=0.0)
    tl.store(parts + tl.program_id(1) * tokens + rows, tl.sum(product * d, 1), mask=rows < tokens)


def contract(delta: torch.Tensor, matrix: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """N (at least 1), float32. delta: (N, D_out); matrix: (D_out, D_in); h: (N, D_in); all float32 or all bfloat16."""
    (tokens, d_in), d_out = h.shape, len(matrix)
    blocks = triton.cdiv(d_out, OUT)
    parts = h.new_empty(blocks, tokens, dtype=torch.float32)
    _contract[(triton.cdiv(tokens, TOKENS), blocks)](
        delta.contiguous(), matrix.contiguous(), h.contiguous(), parts, tokens, d_out, d_in, TOKENS, OUT, IN
    )
    return parts.sum(0)
