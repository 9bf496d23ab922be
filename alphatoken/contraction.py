"""The paper's estimator as bilinear forms (Eqs. 8, 9, 11, 12), pure functions.

    mean_v <delta_p, delta_v><h_p, h_v> = delta_p^T G h_p,    G = (1 / N_val) sum_v delta_v h_v^T

so a token costs one more matrix product per scored linear, whatever the number of validation tokens.
N tokens, D_in and D_out the widths of one linear.
"""

from functools import partial

import torch

from alphatoken.kernel_trial import can_run, run_better


def bilinear(delta: torch.Tensor, matrix: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """delta_n^T M h_n of every token n: N, summed in float32 or wider; by a Triton kernel where that is faster.

    delta: (N, D_out); matrix: (D_out, D_in), in the dtype of h; h: (N, D_in).
    """
    usual = partial(bilinear_by_product, delta, matrix, h)
    if not len(h) or not can_run(delta, matrix, h):
        return usual()
    kind = (*matrix.shape, len(h).bit_length())
    return run_better("contraction", h, kind, partial(_by_kernel, delta, matrix, h), usual)


def bilinear_by_product(delta: torch.Tensor, matrix: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The same in PyTorch, with M h_n in memory."""
    product = torch.matmul(h, matrix.T)
    return (delta * product).sum(-1, dtype=torch.promote_types(h.dtype, torch.float32))


def _by_kernel(delta: torch.Tensor, matrix: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    from alphatoken.contraction_kernel import contract

    return contract(delta, matrix, h)


def outer_sum(delta: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """sum_n delta_n h_n^T: (D_out, D_in), accumulated in float32 or wider."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return torch.matmul(delta.to(wide).T, h.to(wide))


def squared_outer_sum(delta: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """sum_n delta_n^2 (h_n^2)^T, the diagonal Fisher's summand (Eq. 5): (D_out, D_in)."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return torch.matmul(delta.to(wide).square().T, h.to(wide).square())
