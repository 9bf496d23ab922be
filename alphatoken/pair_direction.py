"""The DPO loss of held-out pairs as weights of their tokens, so that direction.py takes its gradient as any other.

    grad of -log sigmoid(s) = omega * (sum over chosen of grad l_t - the same over rejected), omega = beta * sigmoid(-s)

A batch of P pairs has 2P rows: all chosen ones, then all rejected ones. N response tokens of the batch.
"""

from collections.abc import Sequence

import torch

from alphatoken.baselines import forward_losses
from alphatoken.batching import Batch, make_batch
from alphatoken.losses import dpo_omega
from alphatoken.model import ScoringModel
from alphatoken.pair_encode import EncodedPair


def pair_batch(pairs: Sequence[EncodedPair]) -> Batch:
    """P pairs as 2P rows."""
    rows, masks = [], []
    for branch in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            response = getattr(pair, branch)
            rows.append(pair.prompt_ids + response)
            masks.append([False] * len(pair.prompt_ids) + [True] * len(response))
    return make_batch(rows, masks)


class PairWeights:
    """Weights of a pair batch's tokens in the sum of its DPO losses."""

    rows_per_example = 2

    def __init__(self, policy: ScoringModel, reference: ScoringModel | None, beta: float) -> None:
        """reference: None where it is the policy itself; then every log-ratio is zero."""
        self.policy, self.reference, self.beta = policy, reference, beta

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """(+omega or -omega for each token, N; the number of pairs)."""
        pairs = batch.input_ids.shape[0] // 2
        ratios = torch.zeros(2 * pairs, dtype=torch.float64, device=batch.input_ids.device)
        if self.reference is not None:
            losses = forward_losses(self.reference, batch).losses - forward_losses(self.policy, batch).losses
            ratios = torch.stack([row.double().sum() for row in batch.split(losses)])
        omega = dpo_omega(ratios[:pairs], ratios[pairs:], self.beta)
        lengths = batch.response_mask[:, 1:].sum(1)
        return torch.cat([omega, -omega]).repeat_interleave(lengths).float(), float(pairs)
