"""The banded, head-averaged attention of Eq. 9: how the losses of later tokens weigh on an earlier value vector."""

from functools import partial

import torch

from alphatoken.attention import QUERY_BLOCK, AttentionInputs, attention_scores
from alphatoken.kernel_trial import run_better


def banded_average(inputs: AttentionInputs, delta: torch.Tensor, window: int) -> torch.Tensor:
    """abar[p] = sum over 0 < k - p <= window of A[k, p] delta[k], A averaged over heads (Eq. 9): BT(d_out).

    delta: BT(d_out). Memory grows with T x (query block), never with T x T. On GPUs by a Triton kernel where that is
    faster.
    """
    if window == 0:
        return torch.zeros_like(delta)
    usual = partial(average_in_blocks, inputs, delta, window)
    if not inputs.suits_kernels or delta.dtype != inputs.query.dtype:
        return usual()
    kernel = partial(_by_kernel, inputs, delta, window)
    return run_better("banded attention", inputs.query, (*inputs.kind, window), kernel, usual)


def _by_kernel(inputs: AttentionInputs, delta: torch.Tensor, window: int) -> torch.Tensor:
    from alphatoken.band_kernel import average

    return average(inputs.query, inputs.key, delta, inputs.scaling, window)


def average_in_blocks(inputs: AttentionInputs, delta: torch.Tensor, window: int) -> torch.Tensor:
    """The same in PyTorch: scores of one block of queries at a time."""
    length = delta.shape[1]
    result = torch.zeros_like(delta)
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = max(0, start - window)
        scores = attention_scores(inputs, start, stop, 0, stop)  # BHQK
        normalizer = torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, dim=-1, keepdim=True)
        if inputs.sinks is not None:
            normalizer = torch.logaddexp(normalizer, inputs.sinks.to(normalizer.dtype)[None, :, None, None])
        band = torch.exp(scores[..., first:] - normalizer).mean(1)  # BQK, float32
        query = torch.arange(start, stop, device=delta.device)[:, None]
        distance = query - torch.arange(first, stop, device=delta.device)[None]
        band = band.masked_fill((distance <= 0) | (distance > window), 0.0).to(delta.dtype)
        result[:, first:stop] += torch.matmul(band.transpose(1, 2), delta[:, start:stop])
    return result
