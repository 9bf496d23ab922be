"""Signals that tokens are ranked by elsewhere, behind the same interface: the controls for every claim.

loss           l_t
entropy        entropy of the prediction at t
excess_loss    l_t - l_t of a reference model (Rho-1, arXiv 2404.07965)
random         uniform in [0, 1) by (seed, row_id), the same in whatever batch the row is
"""

import hashlib

import torch

from alphatoken.batching import Batch
from alphatoken.head import HeadOutput
from alphatoken.model import ScoringModel
from alphatoken.values import TokenValues


@torch.no_grad()
def forward_losses(scoring: ScoringModel, batch: Batch, entropy: bool = False) -> HeadOutput:
    """A plain forward pass with logits at predicting positions only."""
    return scoring.head(scoring.predicting_states(batch), batch.targets, entropy=entropy)


class Baseline:
    """`loss`, `entropy`, `excess_loss` (nats) or `random` as adaptation; stability is zero.

    Raises:
        ValueError: `excess_loss` without a reference model, or another signal with one.
    """

    def __init__(
        self, scoring: ScoringModel, signal: str, reference: ScoringModel | None = None, seed: int = 0
    ) -> None:
        if (signal == "excess_loss") != (reference is not None):
            raise ValueError("excess_loss, and nothing else, needs a reference model")
        self.scoring, self.signal, self.reference, self.seed = scoring, signal, reference, seed

    def __call__(self, batch: Batch) -> TokenValues:
        head = forward_losses(self.scoring, batch, entropy=self.signal == "entropy")
        if self.signal == "loss":
            value = head.losses
        elif self.signal == "entropy":
            assert head.entropy is not None
            value = head.entropy
        elif self.signal == "excess_loss":
            assert self.reference is not None
            value = head.losses - forward_losses(self.reference, batch).losses
        else:
            value = random_values(batch, self.seed).to(head.losses)
        return TokenValues(value, torch.zeros_like(value), -head.losses)


def random_values(batch: Batch, seed: int) -> torch.Tensor:
    """N float32 in [0, 1)."""
    parts = []
    counts = batch.response_mask[:, 1:].sum(1).tolist()
    for row_id, count in zip(batch.row_ids.tolist(), counts, strict=True):
        digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        parts.append(torch.rand(count, generator=generator))
    return torch.cat(parts)
