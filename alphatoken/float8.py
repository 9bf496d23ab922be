"""Products of 8-bit floats (e4m3: four bits of exponent, three of mantissa), with a scale for every row of a factor.

    a b^T = (a / s_a) (b / s_b)^T * s_a s_b^T      s = largest |element| of the row / 448

A row's scale is its own, so a position's product does not depend on what else is in the batch. GPUs from Ada and Hopper
on multiply 8-bit floats twice as fast as bfloat16; elsewhere torch does the same arithmetic more slowly, which serves
to see what it does to values. Not run on a GPU yet.
"""

from functools import partial

import torch
from torch.nn.functional import ScalingType, scaled_mm
from transformers import PreTrainedModel

from alphatoken.errors import UserError
from alphatoken.kernel_trial import can_run, run_better

FLOAT8 = torch.float8_e4m3fn
SHARE = 1 / torch.finfo(FLOAT8).max  # of a row's largest element: its scale
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros
MULTIPLE = 16  # of both sizes of a weight, for the GPU's kernels
CAPABILITY = (8, 9)  # of GPUs that have such products: Ada

ScaledRows = tuple[torch.Tensor, torch.Tensor]  # (rows, d) float8, and the scale of each row (rows, 1) float32


def check_float8(device: torch.device) -> None:
    """Raises UserError for a GPU that has no products of 8-bit floats."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise UserError(
            f"--tangent-dtype float8 needs a GPU with 8-bit floats (compute capability 8.9: Ada, Hopper or later); "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; leave it out"
        )


def refuse_float8(model: PreTrainedModel) -> UserError:
    """For a model that has no scored weight which fits."""
    return UserError(
        f"--tangent-dtype float8: none of the scored weights of {type(model).__name__} is of a torch linear layer with "
        f"sizes that are multiples of {MULTIPLE}; leave it out"
    )


def fits_float8(weight: torch.Tensor) -> bool:
    """Whether products with this weight can be of 8-bit floats."""
    return weight.dim() == 2 and all(size % MULTIPLE == 0 for size in weight.shape)


class Float8Product:
    """y' = W x' + M x, each factor in 8-bit floats.

    weight: W, (d_out, d_in); tangent: M, the same shape. See `tangent_linear.Product`.
    """

    def __init__(self, weight: torch.Tensor, tangent: torch.Tensor) -> None:
        self.weight, self.tangent = scaled_rows(weight.contiguous()), scaled_rows(tangent.contiguous())

    def __call__(self, x_tangent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return multiplied(x_tangent, self.weight).add_(multiplied(x, self.tangent))


def multiplied(x: torch.Tensor, weight: ScaledRows) -> torch.Tensor:
    """x W^T: (..., d_out) in the dtype of x, which is float32 or bfloat16. x: (..., d_in)."""
    rows, scales = scaled_rows(x.reshape(-1, x.shape[-1]).contiguous())
    product = scaled_mm(
        rows,
        weight[0].T,
        scales,
        ScalingType.RowWise,
        weight[1].T,
        ScalingType.RowWise,
        output_dtype=x.dtype if x.device.type == "cpu" else torch.bfloat16,
        use_fast_accum=True,
    )
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def scaled_rows(x: torch.Tensor) -> ScaledRows:
    """Every row over its own scale; by a Triton kernel where that is faster. x: (rows, d), contiguous."""
    usual = partial(scaled_in_steps, x)
    if not len(x) or not can_run(x):
        return usual()
    kind = (x.shape[1], len(x).bit_length())
    scaled, scales = run_better("rows in 8-bit floats", x, kind, partial(_by_kernel, x), usual)
    return scaled, scales


def scaled_in_steps(x: torch.Tensor) -> ScaledRows:
    """The same in PyTorch."""
    scale = (x.abs().amax(-1, keepdim=True).float() * SHARE).clamp_min(SMALLEST_SCALE)
    return (x / scale).to(FLOAT8), scale


def _by_kernel(x: torch.Tensor) -> ScaledRows:
    from alphatoken.scaling_kernel import scale_rows

    return scale_rows(x)
