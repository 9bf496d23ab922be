"""Backward passes through linear layers at the positions of responses alone.

The gradient of a row's response losses at its response positions comes from there and from later positions, never from
the prompt before the first of them: attention is causal. Where nothing else is asked for, linears multiply gradients
between a row's first and last predicting position only. What comes out elsewhere means nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from alphatoken.architecture import decoder_layers
from alphatoken.batching import Batch
from alphatoken.model import ScoringModel


@contextmanager
def response_backward(scoring: ScoringModel, batch: Batch, first_layer: int) -> Iterator[None]:
    """The linears of the layers from `first_layer` on; others (Conv1D, experts) go back as ever, to the same effect."""
    positions = batch.span.flatten().nonzero().squeeze(1)
    linears = [
        module
        for layer in decoder_layers(scoring.model)[first_layer:]
        for module in layer.modules()
        if type(module) is nn.Linear
    ]
    try:
        for module in linears:
            module.forward = _forward_of(module, batch.input_ids.shape, positions)  # type: ignore[method-assign]
        yield
    finally:
        for module in linears:
            module.__dict__.pop("forward", None)


def _forward_of(module: nn.Linear, shape: torch.Size, positions: torch.Tensor):
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.shape[:-1] != shape:  # positions in another order: routed to experts
            return nn.functional.linear(x, module.weight, module.bias)
        return _Linear.apply(x, module.weight, module.bias, positions)

    return forward


class _Linear(torch.autograd.Function):
    """A frozen linear layer whose input has a gradient at some positions only."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, positions: torch.Tensor):
        ctx.save_for_backward(weight, positions)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        weight, positions = ctx.saved_tensors
        flat = gradient.flatten(0, 1)
        result = flat.new_zeros(len(flat), weight.shape[1])
        result[positions] = flat[positions] @ weight
        return result.view(*gradient.shape[:2], -1), None, None, None
