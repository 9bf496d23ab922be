"""Forward-mode tangents of a bfloat16 model's linear layers, multiplied in float32.

    y = W x + b      y' = W x' + M x = [W M] [x' x]

A CPU without AMX multiplies float32 faster than bfloat16. There the tangent, two of the three products of a linear
layer, takes one float32 product: faster and more exact, for memory of twice the scored weights in float32.
"""

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers import PreTrainedModel

from alphatoken.direction import Tensors
from alphatoken.replaced_forward import replaced_forward

Stacked = dict[nn.Linear, torch.Tensor]  # module -> [W M], (d_out, 2 d_in) float32


def wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tangents of this model should be multiplied in float32."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    return device.type == "cpu" and dtype == torch.bfloat16 and not has_amx


def stacked_weights(model: PreTrainedModel, tangents: Tensors) -> tuple[Stacked, Tensors]:
    """[W M] of every linear layer whose weight has a tangent, and the other tangents: of the output head and of other
    kinds of layers, which are left to forward-mode AD.
    """
    found, others = {}, dict(tangents)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not model.get_output_embeddings() and f"{name}.weight" in others:
            tangent = others.pop(f"{name}.weight").to(module.weight.device)
            found[module] = torch.cat([module.weight.detach().float(), tangent.float()], -1)
    return found, others


def stacked_tangents(stacked: Stacked) -> AbstractContextManager[None]:
    """Inside a dual level: the layers' outputs carry the tangent that the stacked weights give."""
    return replaced_forward({module: _forward_of(module, weight) for module, weight in stacked.items()})


def _forward_of(module: nn.Linear, weight: torch.Tensor):
    def forward(x: torch.Tensor) -> torch.Tensor:
        if forward_ad.unpack_dual(x).tangent is None:
            x = forward_ad.make_dual(x, torch.zeros_like(x))
        return _Linear.apply(x, module.weight, module.bias, weight)

    return forward


class _Linear(torch.autograd.Function):
    """A linear layer with the tangent [W M] [x' x]."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stacked: torch.Tensor):
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_forward(inputs[0])
        ctx.stacked = inputs[3]

    @staticmethod
    def jvp(ctx, x_tangent: torch.Tensor, _weight, bias_tangent: torch.Tensor | None, _stacked) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        tangent = nn.functional.linear(torch.cat([x_tangent, x], -1).float(), ctx.stacked).to(x.dtype)
        return tangent if bias_tangent is None else tangent + bias_tangent
