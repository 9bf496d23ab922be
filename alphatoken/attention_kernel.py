"""Attention and its forward-mode tangent in one Triton kernel: no score ever reaches memory.

    S = scale Q K^T    S' = scale (Q' K^T + Q K'^T)    P = softmax(S)    P' = P * (S' - rowsum(P * S'))
    O = P V            O' = P' V + P V'

Row by row with running sums, as in flash attention: of e = exp(S - max), of e S', of e V, and of e S' V + e V'.
Causal, without softcap and sinks. Needs Triton, which comes with torch's GPU builds, or Triton's interpreter.

Not run on a GPU yet: on trial there (`kernel_trial.py`).

B batch, H heads, G key-value heads, T positions, D head width.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit
def _attend(
    query, key, value, query_tangent, key_tangent, value_tangent, output, output_tangent,
    heads, groups, length, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. All tensors are contiguous: B * heads (or groups) x T x D."""
    block, number = tl.program_id(0), tl.program_id(1)
    shared = number // heads * groups + number % heads // (heads // groups)  # the key-value head
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    own = number.to(tl.int64) * length * WIDTH + rows[:, None] * WIDTH + columns[None]
    inside = rows[:, None] < length
    q = tl.load(query + own, mask=inside, other=0.0)
    dq = tl.load(query_tangent + own, mask=inside, other=0.0)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK, WIDTH], tl.float32)
    moved = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        theirs = shared.to(tl.int64) * length * WIDTH + keys[:, None] * WIDTH + columns[None]
        there = keys[:, None] < length
        k = tl.load(key + theirs, mask=there, other=0.0)
        dk = tl.load(key_tangent + theirs, mask=there, other=0.0)
        v = tl.load(value + theirs, mask=there, other=0.0)
        dv = tl.load(value_tangent + theirs, mask=there, other=0.0)
        scores = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        change = scale * tl.dot(dq, tl.trans(k), input_precision="ieee")
        change += scale * tl.dot(q, tl.trans(dk), input_precision="ieee")
        scores = tl.where((keys[None] <= rows[:, None]) & (keys[None] < length), scores, -float("inf"))
        highest = tl.maximum(largest, tl.max(scores, 1))
        fade = tl.exp(largest - highest)
        weight = tl.exp(scores - highest[:, None])
        weighted = weight * change
        total = total * fade + tl.sum(weight, 1)
        slope = slope * fade + tl.sum(weighted, 1)
        weight, weighted = weight.to(v.dtype), weighted.to(v.dtype)
        mean = mean * fade[:, None] + tl.dot(weight, v, input_precision="ieee")
        moved = moved * fade[:, None] + tl.dot(weighted, v, input_precision="ieee")
        moved += tl.dot(weight, dv, input_precision="ieee")
        largest = highest
    mean = mean / total[:, None]
    moved = moved / total[:, None] - (slope / total)[:, None] * mean
    tl.store(output + own, mean.to(output.dtype.element_ty), mask=inside)
    tl.store(output_tangent + own, moved.to(output.dtype.element_ty), mask=inside)


def attend(
    primal: Sequence[torch.Tensor], tangent: Sequence[torch.Tensor], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, O'), each BHTD. primal, tangent: query BHTD, key BGTD and value BGTD; D is a power of two, 16 to 128."""
    query, key, value = (x.contiguous() for x in primal)
    tangents = [x.contiguous() for x in tangent]
    rows, heads, length, width = query.shape
    output, output_tangent = torch.empty_like(query), torch.empty_like(query)
    block = 32 if width == 128 else 64
    _attend[(triton.cdiv(length, block), rows * heads)](
        query, key, value, *tangents, output, output_tangent,
        heads, key.shape[1], length, scale, WIDTH=width, BLOCK=block,
    )  # fmt: skip
    return output, output_tangent
