"""Forward-mode tangents of linear layers, multiplied in another precision than the model's.

    y = W x + b      y' = W x' + M x

The tangent is two of the three products of a linear layer, and need not be made of the model's dtype:

    float32   [W M] [x' x], where a CPU has no instructions for bfloat16 and so multiplies float32 faster: more exact
              too, for memory of twice the scored weights in float32
    float8    W x' and M x with every factor as 8-bit floats (`--tangent-dtype float8`, float8.py): a GPU multiplies
              those twice as fast as bfloat16
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers import PreTrainedModel

from alphatoken.direction import Tensors
from alphatoken.float8 import Float8Product, fits_float8, refuse_float8
from alphatoken.replaced_forward import replaced_forward

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x' and x, (..., d_in) each -> y' (..., d_out)
Products = dict[nn.Linear, Product]


def wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tangents of this model should be multiplied in float32, unless they are asked for in 8-bit floats."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not _multiplies_bfloat16()


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it (AMX or AVX512_BF16)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: True)() for check in checks)


class WideProduct:
    """y' = [W M] [x' x] in float32."""

    def __init__(self, weight: torch.Tensor, tangent: torch.Tensor) -> None:
        self.stacked = torch.cat([weight.float(), tangent.float()], -1)  # (d_out, 2 d_in)

    def __call__(self, x_tangent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.cat([x_tangent, x], -1).float(), self.stacked)


def products_of(
    model: PreTrainedModel, tangents: Tensors, tangent_dtype: str | None, wide: bool
) -> tuple[Products, Tensors]:
    """The products of linear layers whose weight has a tangent, and the tangents that are left to forward-mode AD: of
    the output head, of other kinds of layers, and all of them where nothing else than the model's dtype is wanted.

    Raises:
        UserError: tangent_dtype fits no layer.
    """
    found: Products = {}
    others = dict(tangents)
    if not tangent_dtype and not wide:
        return found, others
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module is model.get_output_embeddings() or f"{name}.weight" not in others:
            continue
        weight = module.weight.detach()
        if not tangent_dtype:
            found[module] = WideProduct(weight, others.pop(f"{name}.weight").to(weight.device))
        elif fits_float8(weight):
            found[module] = Float8Product(weight, others.pop(f"{name}.weight").to(weight.device))
    if tangent_dtype and not found:
        raise refuse_float8(model)
    return found, others


def tangents_by(products: Products) -> AbstractContextManager[None]:
    """Inside a dual level: these layers' outputs carry the tangents that the products give."""
    return replaced_forward({module: _forward_of(module, product) for module, product in products.items()})


def _forward_of(module: nn.Linear, product: Product) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if forward_ad.unpack_dual(x).tangent is None:
            x = forward_ad.make_dual(x, torch.zeros_like(x))
        return _Linear.apply(x, module.weight, module.bias, product)

    return forward


class _Linear(torch.autograd.Function):
    """A linear layer whose tangent is a product of its own."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, product: Product):
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_forward(inputs[0])
        ctx.product = inputs[3]

    @staticmethod
    def jvp(ctx, x_tangent: torch.Tensor, _weight, bias_tangent: torch.Tensor | None, _product) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        tangent = ctx.product(x_tangent, x).to(x.dtype)
        return tangent if bias_tangent is None else tangent + bias_tangent
