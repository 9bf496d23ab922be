"""The banded, head-averaged attention of Eq. 9 in Triton: no score outside the band ever reaches memory.

    abar[p] = sum over 0 < k - p <= window of A[k, p] delta[k],    A[k, p] = mean over heads of exp(S[k, p] - n[k])

One kernel runs over all keys for the normalizers n, with running sums as in flash attention. The next makes the band,
stored by blocks of keys with the queries that see them; a batched matrix product does the rest. Causal, without
softcap and sinks. Not run on a GPU yet: on trial there (`kernel_trial.py`).

B batch, H heads, G key-value heads, T positions, D head width.
"""

import torch
import triton
import triton.language as tl

BLOCK = 32  # queries, and keys


@triton.jit
def _normalize(query, key, normalizer, heads, groups, length, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One block of queries of one head: log of the sum of exp of its scores. Tensors are contiguous."""
    block, number = tl.program_id(0), tl.program_id(1)
    shared = number // heads * groups + number % heads // (heads // groups)  # the key-value head
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    own = number.to(tl.int64) * length * WIDTH + rows[:, None] * WIDTH + columns[None]
    q = tl.load(query + own, mask=rows[:, None] < length, other=0.0)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        theirs = shared.to(tl.int64) * length * WIDTH + keys[:, None] * WIDTH + columns[None]
        k = tl.load(key + theirs, mask=keys[:, None] < length, other=0.0)
        scores = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where((keys[None] <= rows[:, None]) & (keys[None] < length), scores, -float("inf"))
        highest = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp(largest - highest) + tl.sum(tl.exp(scores - highest[:, None]), 1)
        largest = highest
    tl.store(normalizer + number.to(tl.int64) * length + rows, largest + tl.log(total), mask=rows < length)


@triton.jit
def _band(
    query, key, normalizer, band, heads, groups, length, window, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of keys and one of the blocks of queries that see it. band: B, blocks, keys of it, their queries."""
    block, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = block * BLOCK + tl.arange(0, BLOCK)
    queries = (block + part) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for head in range(heads):
        first_query = (row * heads + head) * length
        first_key = (row * groups + head // (heads // groups)) * length
        q = tl.load(
            query + (first_query + queries[None]) * WIDTH + columns[:, None], mask=queries[None] < length, other=0.0
        )
        k = tl.load(key + (first_key + keys[:, None]) * WIDTH + columns[None], mask=keys[:, None] < length, other=0.0)
        n = tl.load(normalizer + first_query + queries, mask=queries < length, other=float("inf"))
        total += tl.exp(scale * tl.dot(k, q, input_precision="ieee") - n[None])
    distance = queries[None] - keys[:, None]
    seen = (distance > 0) & (distance <= window) & (queries[None] < length)
    parts = tl.num_programs(1)
    places = ((row * tl.num_programs(0) + block) * BLOCK + tl.arange(0, BLOCK)[:, None]) * parts * BLOCK
    places += part * BLOCK + tl.arange(0, BLOCK)[None]
    tl.store(band + places, tl.where(seen, total / heads, 0.0).to(band.dtype.element_ty))


def average(
    query: torch.Tensor, key: torch.Tensor, delta: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """abar, BT(d_out). query: BHTD; key: BGTD; delta: BT(d_out); window: at least 1."""
    query, key = query.contiguous(), key.contiguous()
    rows, heads, length, width = query.shape
    blocks, parts = triton.cdiv(length, BLOCK), 1 + triton.cdiv(window, BLOCK)
    normalizer = query.new_empty(rows, heads, length, dtype=torch.float32)
    _normalize[(blocks, rows * heads)](query, key, normalizer, heads, key.shape[1], length, scale, width, BLOCK)
    band = delta.new_empty(rows, blocks, BLOCK, parts * BLOCK)
    _band[(blocks, parts, rows)](
        query, key, normalizer, band, heads, key.shape[1], length, window, scale, width, BLOCK
    )
    after = (blocks + parts - 1) * BLOCK - length
    padded = torch.nn.functional.pad(delta, (0, 0, 0, after))
    ahead = padded.unfold(1, parts * BLOCK, BLOCK)  # B, blocks, d_out, queries
    return torch.matmul(band, ahead.transpose(2, 3)).flatten(1, 2)[:, :length]
