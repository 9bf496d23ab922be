"""Backward passes through linear layers at the positions of responses alone.

The gradient of a row's response losses at its response positions comes from there and from later positions, never from
the prompt before the first of them: attention is causal. Where nothing else is asked for, linears multiply gradients
between a row's first and last predicting position only. What comes out elsewhere means nothing.
"""

from contextlib import AbstractContextManager

import torch
from torch import nn

from alphatoken.architecture import decoder_layers
from alphatoken.batching import Batch
from alphatoken.model import ScoringModel
from alphatoken.replaced_forward import replaced_forward


def response_backward(scoring: ScoringModel, batch: Batch, first_layer: int) -> AbstractContextManager[None]:
    """The linears of the layers from `first_layer` on; others (Conv1D, experts) go back as ever, to the same effect."""
    linears = [
        module
        for layer in decoder_layers(scoring.model)[first_layer:]
        for module in layer.modules()
        if type(module) is nn.Linear
    ]
    shape, places = batch.input_ids.shape, batch.span_places
    return replaced_forward({module: _forward_of(module, shape, places) for module in linears})


def _forward_of(module: nn.Linear, shape: torch.Size, places: torch.Tensor):
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.shape[:-1] != shape:  # positions in another order: routed to experts
            return nn.functional.linear(x, module.weight, module.bias)
        return _Linear.apply(x, module.weight, module.bias, places)

    return forward


class _Linear(torch.autograd.Function):
    """A frozen linear layer whose input has a gradient at some positions only."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, places: torch.Tensor):
        ctx.save_for_backward(weight, places)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        weight, places = ctx.saved_tensors
        flat = gradient.flatten(0, 1)
        result = flat.new_zeros(len(flat), weight.shape[1])
        result[places] = flat[places] @ weight.to(flat.dtype)  # autocast's; it may not reach this thread
        return result.view(*gradient.shape[:2], -1), None, None, None
