"""Preference pairs of which a known share is flipped, and what a model makes of them: DPO's loss, margins, gradient.

    s = beta * ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)),    loss = -log sigmoid(s)

The reference is the model at its start; its log-probabilities are computed once per response.
P pairs of a batch are 2P rows, all chosen ones first; T positions, N response tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alphatoken.architecture import decoder
from alphatoken.baselines import forward_losses
from alphatoken.batching import Batch, plan_batches
from alphatoken.errors import BadRowError
from alphatoken.head import TrainedLosses
from alphatoken.losses import dpo_loss
from alphatoken.model import ScoringModel, default_device
from alphatoken.pair_direction import pair_batch
from alphatoken.pair_encode import EncodedPair, PairEncoder

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Pair:
    """One encoded pair, as it is trained on. flipped: chosen and rejected have changed places."""

    row_id: int
    ids: EncodedPair
    flipped: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two rows."""
        return len(self.ids.prompt_ids) + max(len(self.ids.chosen_ids), len(self.ids.rejected_ids))


@dataclass(frozen=True)
class PairTask:
    """What one seed trains on, in the order of training. Validation pairs are clean."""

    train: list[Pair]
    validation: list[Pair]


def short_pairs(encoder: PairEncoder, rows: list[dict], longest: int) -> list[Pair]:
    """Pairs whose rows both have at most `longest` tokens. A pair that cannot be used (two equal sides) is left out."""
    found = []
    for number, row in enumerate(rows):
        try:
            pair = Pair(number, encoder.encode(row))
        except BadRowError:
            continue
        if pair.longest <= longest and not pair.ids.truncated:
            found.append(pair)
    return found


def flipped(pair: Pair) -> Pair:
    ids = pair.ids
    return Pair(pair.row_id, EncodedPair(ids.prompt_ids, ids.rejected_ids, ids.chosen_ids, ids.truncated), True)


def make_pair_task(pairs: list[Pair], seed: int, count: int, validation: int, flipped_share: float) -> PairTask:
    """Draws `count` training pairs, of which a share is flipped, and clean validation pairs, by seed."""
    if len(pairs) < count + validation:
        raise ValueError(f"only {len(pairs)} pairs are short enough; {count + validation} are needed")
    order = np.random.default_rng([seed, 0]).permutation(len(pairs))
    drawn = [pairs[i] for i in order[: count + validation]]
    train, known = drawn[:count], drawn[count:]
    train[: round(flipped_share * count)] = map(flipped, train[: round(flipped_share * count)])
    return PairTask([train[i] for i in np.random.default_rng([seed, 1]).permutation(count)], known)


def batch_of_pairs(pairs: Sequence[Pair]) -> Batch:
    """On the GPU where there is one."""
    return pair_batch([pair.ids for pair in pairs]).to(default_device())


def pair_batches(pairs: Sequence[Pair]) -> Iterator[tuple[list[int], Batch]]:
    """(indices into pairs, batch) of pairs of similar length."""
    for group in plan_batches([2 * pair.longest for pair in pairs], BATCH_TOKENS):
        yield group, batch_of_pairs([pairs[i] for i in group])


class Reference:
    """Log-probabilities of response tokens at the start weights, by the ids of the row."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def add(self, scoring: ScoringModel, pairs: Sequence[Pair]) -> None:
        """Computes what is missing; `scoring` has to be at the start."""
        missing = [pair for pair in pairs if not all(key in self.known for key in row_keys(pair))]
        for group, batch in pair_batches(missing):
            parts = batch.split(-forward_losses(scoring, batch).losses)
            keys = [row_keys(missing[i]) for i in group]
            self.known |= dict(zip([chosen for chosen, _ in keys] + [other for _, other in keys], parts, strict=True))

    def of(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """N: in the order of a batch of these pairs."""
        keys = [row_keys(pair) for pair in pairs]
        return torch.cat([self.known[key[side]] for side in range(2) for key in keys])


def row_keys(pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids = pair.ids
    return tuple(ids.prompt_ids + ids.chosen_ids), tuple(ids.prompt_ids + ids.rejected_ids)


def margins(scoring: ScoringModel, pairs: Sequence[Pair], reference: Reference, beta: float) -> np.ndarray:
    """s of every pair, float64 (P,)."""
    found = np.zeros(len(pairs))
    for group, batch in pair_batches(pairs):
        ratios = -forward_losses(scoring, batch).losses - reference.of([pairs[i] for i in group])
        sums = [float(row.double().sum()) for row in batch.split(ratios)]
        found[group] = beta * (np.array(sums[: len(group)]) - np.array(sums[len(group) :]))
    return found


def dpo_losses(margin: np.ndarray) -> np.ndarray:
    """-log sigmoid(s)."""
    return np.logaddexp(0.0, -margin)


def add_dpo_gradient(
    scoring: ScoringModel, pairs: Sequence[Pair], kept: torch.Tensor, reference: Reference, beta: float
) -> float:
    """Gradient of the mean DPO loss of `pairs`, added to .grad. kept: bool N, tokens that it goes through.

    Returns the loss.
    """
    batch = batch_of_pairs(pairs)
    hidden = decoder(scoring.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    losses, _ = TrainedLosses.apply(
        hidden[batch.predicting], scoring.head.projection.weight, batch.targets, scoring.head
    )  # fmt: skip
    here, there = _grid(batch, -losses), _grid(batch, reference.of(pairs))
    kept_grid = _grid(batch, kept.to(losses)).bool()
    count = len(pairs)
    loss = dpo_loss(
        here[:count], here[count:], kept_grid[:count], kept_grid[count:], there[:count], there[count:], beta
    )
    mean = loss.total / loss.count
    mean.backward()
    return float(mean.detach())


def _grid(batch: Batch, per_token: torch.Tensor) -> torch.Tensor:
    """N values at their labels, (2P, T); zero elsewhere."""
    grid = per_token.new_zeros(batch.input_ids.shape)
    return grid.masked_scatter(batch.response_mask, per_token)
