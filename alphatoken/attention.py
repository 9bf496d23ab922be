"""The attention function that scored models run with.

Registered with transformers as "alphatoken". It is plain SDPA unless a context asks for more:
- `recording(layers)` keeps queries, keys (after RoPE) and values of those layers, for value propagation's causal path;
- `differentiable()` uses matrix products and softmax in blocks of queries, which forward-mode AD can follow (fused
  kernels have no forward-mode rule), or our own kernel where that is faster; only where a tangent reaches the layer.

B batch, H heads, G key-value heads, T positions, D head width, Q queries of one block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch.autograd import forward_ad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alphatoken.errors import UserError
from alphatoken.kernel_trial import can_run, run_better

NAME = "alphatoken"
QUERY_BLOCK = 128
KERNEL_WIDTHS = (16, 32, 64, 128)  # of heads, in Triton


@dataclass
class AttentionInputs:
    """What one layer's attention was given."""

    query: torch.Tensor  # BHTD
    key: torch.Tensor  # BGTD
    value: torch.Tensor  # BGTD
    mask: torch.Tensor | None  # B1TT bool or additive; None: causal
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None = None  # H: logits of a key without a value (gpt-oss)

    @property
    def cached(self) -> int:
        """Keys from before the first query: zero but in generation with a key-value cache."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def suits_kernels(self) -> bool:
        """Whether it is of the kind that the Triton kernels know: causal, nothing special, no cache, on a GPU."""
        special = self.mask is not None or self.softcap is not None or self.sinks is not None or self.cached
        return not special and self.query.shape[-1] in KERNEL_WIDTHS and can_run(self.query, self.key)

    @property
    def kind(self) -> tuple[int, ...]:
        """What decides whether a kernel pays: the head width, and the length to a power of two."""
        *_, length, width = self.query.shape
        return width, length.bit_length()


@dataclass
class _Recording:
    layers: set[int]
    inputs: dict[int, AttentionInputs] = field(default_factory=dict)


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)
_differentiable: ContextVar[bool] = ContextVar("differentiable", default=False)


@contextmanager
def recording(layers: set[int]) -> Iterator[dict[int, AttentionInputs]]:
    """Fills the yielded dict with the attention inputs of the named layers as the model runs."""
    record = _Recording(set(layers))
    token = _recording.set(record)
    try:
        yield record.inputs
    finally:
        _recording.reset(token)


@contextmanager
def differentiable() -> Iterator[None]:
    """Layers that a tangent reaches use operations with a forward-mode rule."""
    token = _differentiable.set(True)
    try:
        yield
    finally:
        _differentiable.reset(token)


def attention_scores(inputs: AttentionInputs, start: int, stop: int, first_key: int, last_key: int) -> torch.Tensor:
    """Logits of queries [start, stop) on keys [first_key, last_key): BHQK, masked entries at the dtype's minimum."""
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    key = repeat_kv(inputs.key[:, :, first_key:last_key], groups)
    scores = torch.matmul(inputs.query[:, :, start:stop] * inputs.scaling, key.transpose(-1, -2))
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if inputs.mask is None:
        allowed = torch.ones(stop - start, last_key - first_key, dtype=torch.bool, device=scores.device)
        allowed = allowed.tril(inputs.cached + start - first_key)
    elif inputs.mask.dtype == torch.bool:
        allowed = inputs.mask[:, :, start:stop, first_key:last_key]
    else:
        return scores + inputs.mask[:, :, start:stop, first_key:last_key]
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)


def attend_in_blocks(inputs: AttentionInputs) -> torch.Tensor:
    """Softmax attention BHTD from plain operations, memory linear in T for a fixed block."""
    length = inputs.query.shape[2]
    value = repeat_kv(inputs.value, inputs.query.shape[1] // inputs.value.shape[1])
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        last_key = inputs.cached + stop  # causal: keys after the block are never seen
        scores = attention_scores(inputs, start, stop, 0, last_key)
        probabilities = _softmax(scores, inputs.sinks)
        blocks.append(torch.matmul(probabilities.to(value.dtype), value[:, :, :last_key]))
    return torch.cat(blocks, dim=2)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the keys of BHQK; what falls to the sinks is lost. float32 or wider."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=wide)
    sink = sinks.to(scores.dtype)[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=wide)[..., :-1]


def _attend_with_tangent(inputs: AttentionInputs) -> torch.Tensor:
    """BHTD from dual numbers, by the kernel where it does better."""
    if not _tangent_suits_kernel(inputs):
        return attend_in_blocks(inputs)

    def usual() -> tuple[torch.Tensor, ...]:
        return tuple(forward_ad.unpack_dual(attend_in_blocks(inputs)))

    kernel = partial(_tangent_by_kernel, inputs)
    return forward_ad.make_dual(*run_better("attention and tangent", inputs.query, inputs.kind, kernel, usual))


def _tangent_suits_kernel(inputs: AttentionInputs) -> bool:
    return (
        inputs.suits_kernels
        and inputs.value.shape[-1] == inputs.query.shape[-1]
        and not (torch.is_grad_enabled() and inputs.query.requires_grad)  # in-run: the tangent rides on a graph
        and not torch._C._functorch.is_functorch_wrapped_tensor(inputs.query)  # several targets: a batch of tangents
    )


def _tangent_by_kernel(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, its tangent); a missing tangent is zero."""
    from alphatoken.attention_kernel import attend

    parts = [forward_ad.unpack_dual(x) for x in (inputs.query, inputs.key, inputs.value)]
    tangents = [torch.zeros_like(part.primal) if part.tangent is None else part.tangent for part in parts]
    return attend([part.primal for part in parts], tangents, inputs.scaling)


def _has_tangent(*tensors: torch.Tensor) -> bool:
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; s_aux are the sinks. Returns (BTHD, None)."""
    if kwargs.get("position_bias") is not None:
        raise UserError(f"{type(module).__name__} uses position_bias in attention, which is not supported yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = AttentionInputs(query, key, value, attention_mask, scale, softcap, s_aux)
    record = _recording.get()
    if record is not None and module.layer_idx in record.layers:
        record.inputs[cast(int, module.layer_idx)] = inputs
    if _differentiable.get() and _has_tangent(query, key, value):
        return _attend_with_tangent(inputs).transpose(1, 2).contiguous(), None
    if softcap is not None or s_aux is not None:
        return attend_in_blocks(inputs).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@torch.no_grad()
def settle_attention(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Models that compute attention themselves (Bloom) get masks of the kind that they add to their logits.

    transformers makes masks for the attention that the configuration names, whether or not the model uses it: ours
    would be boolean, or none at all where a kernel is told to be causal. ids: any few tokens, BT.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != NAME:
        return
    with recording(set(range(config.num_hidden_layers))) as seen:
        model(input_ids=ids, use_cache=False)
    if not seen:
        config._attn_implementation_internal = "eager"


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
