"""Masked losses: SFT (Eq. 13) and DPO (Eq. 14), as sums with counts. No model, no I/O.

    SFT    L = sum over kept tokens of l_t                        l_t = -log pi(y_t given x, y_<t)
    DPO    L = -log sigmoid(s),   s = beta * ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected))
           gradient in mode `loss` (the paper): -omega * (sum over kept chosen of grad log pi - the same over rejected),
           omega = beta * sigmoid(-s) held constant, s over the whole responses
           mode `ratio`: s itself over the kept tokens only, its gradient as it comes

B rows, T positions, V vocabulary. Everything per token is aligned to the label: entry i is about predicting
input_ids[i] (see schema.py), entry 0 is zero because nothing predicts the first token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from alphatoken.schema import IGNORE_INDEX

DPOMask = Literal["loss", "ratio"]


@dataclass(frozen=True)
class LossSum:
    """The caller divides: by the counts of all micro-batches and workers that share an optimizer step."""

    total: torch.Tensor  # scalar, with gradient
    count: torch.Tensor  # scalar: kept tokens (or the sum of their weights) for SFT, pairs for DPO


def token_logprobs(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """(B, T) log-probability of every label, in fp32 or better; zero where the label is -100 and at position 0."""
    targets = labels_BT[:, 1:]
    asked = targets != IGNORE_INDEX
    logits = logits_BTV[:, :-1].float() if logits_BTV.dtype != torch.float64 else logits_BTV[:, :-1]
    found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return F.pad(torch.where(asked, found, 0.0), (1, 0))


def sft_loss(logprobs_BT: torch.Tensor, kept_BT: torch.Tensor, weights_BT: torch.Tensor | None = None) -> LossSum:
    """Sum over kept tokens of weight * l_t, and the sum of the weights (without weights: the number of kept tokens)."""
    weights = kept_BT.to(logprobs_BT.dtype) if weights_BT is None else kept_BT * weights_BT.to(logprobs_BT.dtype)
    return LossSum(-(logprobs_BT * weights).sum(), weights.sum())


def masked_sft_loss(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, weights_BT: torch.Tensor | None = None
) -> LossSum:
    """`sft_loss` from logits and labels (-100: not trained on)."""
    kept = labels_BT != IGNORE_INDEX
    kept = torch.cat([torch.zeros_like(kept[:, :1]), kept[:, 1:]], dim=1)
    return sft_loss(token_logprobs(logits_BTV, labels_BT), kept, weights_BT)


def detach_masked(logprobs_BT: torch.Tensor, kept_BT: torch.Tensor) -> torch.Tensor:
    """The same values; gradient only where kept. Sums of them are whole-response, their gradients are not."""
    return torch.where(kept_BT, logprobs_BT, logprobs_BT.detach())


def dpo_omega(chosen_ratio_B: torch.Tensor, rejected_ratio_B: torch.Tensor, beta: float) -> torch.Tensor:
    """(B,) beta * sigmoid(-s): how strongly a pair pulls, from log-ratios (log pi - log pi_ref) of whole responses.

    A chosen token's loss counts with omega, a rejected token's with -omega (Eq. 14); so do their values.
    """
    return beta * torch.sigmoid(-beta * (chosen_ratio_B - rejected_ratio_B))


def dpo_loss(
    chosen_BT: torch.Tensor,
    rejected_BT: torch.Tensor,
    chosen_kept_BT: torch.Tensor,
    rejected_kept_BT: torch.Tensor,
    ref_chosen_BT: torch.Tensor,
    ref_rejected_BT: torch.Tensor,
    beta: float,
    mode: DPOMask = "loss",
) -> LossSum:
    """Sum over pairs of -log sigmoid(s), and the number of pairs.

    All log-probabilities are per token and zero outside the response; the two sides may differ in T.
    """
    if mode == "ratio":
        chosen = ((chosen_BT - ref_chosen_BT) * chosen_kept_BT).sum(1)
        rejected = ((rejected_BT - ref_rejected_BT) * rejected_kept_BT).sum(1)
    else:
        chosen = (detach_masked(chosen_BT, chosen_kept_BT) - ref_chosen_BT).sum(1)
        rejected = (detach_masked(rejected_BT, rejected_kept_BT) - ref_rejected_BT).sum(1)
    losses_B = -F.logsigmoid(beta * (chosen - rejected))
    return LossSum(losses_B.sum(), torch.tensor(float(len(losses_B)), device=losses_B.device))
