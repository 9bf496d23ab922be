"""Validation rows, or held-out pairs, in blocks and batches."""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from alphatoken.batching import Batch, make_batch, plan_batches
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.encode import Encoded, Encoder
from alphatoken.model import ScoringModel
from alphatoken.pair_direction import pair_batch
from alphatoken.pair_encode import EncodedPair, PairEncoder
from alphatoken.sources import plan_units
from alphatoken.suspects import TokenLosses, validation_losses
from alphatoken.token_classes import class_of_ids
from pipelines.encode import good_rows
from pipelines.kept_sum import Block
from pipelines.refused import Refused

ROWS_IN_MEMORY = 256  # sorted by length at a time
PROFILED_ROWS = 1024  # whose losses are looked at: more would hardly move a quantile


def validation_blocks(
    config: ScoreConfig | DirectionConfig, encoder: Encoder, refused: list[Refused], half: int
) -> Iterator[Block]:
    """Every second usable row, from row `half` on. Those that cannot be used are added to `refused` by half 0."""
    pairs = config.validation_objective == "dpo"
    encode = (PairEncoder(encoder) if pairs else encoder).encode
    usable = good_rows(plan_units(config.validation), encode, [] if half else refused, config.columns)
    rows = islice(usable, half, None, 2)
    while block := list(islice(rows, ROWS_IN_MEMORY)):
        yield block


def profiled_losses(
    scoring: ScoringModel, config: ScoreConfig | DirectionConfig, encoder: Encoder, killed: Collection[int]
) -> TokenLosses:
    """Losses of the first usable validation rows at the current weights. killed: row ids to pass over."""
    usable = good_rows(plan_units(config.validation), encoder.encode, [])
    rows = islice((encoded for row_id, encoded in usable if row_id not in killed), PROFILED_ROWS)
    class_of = torch.from_numpy(class_of_ids(config.model, config.trust_remote_code))
    return validation_losses(scoring, batches_of(config, list(rows), scoring.device), class_of)


def batches_of(config: ScoreConfig | DirectionConfig, rows: list[Any], device: torch.device) -> Iterator[Batch]:
    """Encoded rows, or encoded pairs, in batches of similar length; one by one where each counts by itself."""
    if config.normalization == "sequence":
        groups: Iterable[list[int]] = ([i] for i in range(len(rows)))
    else:
        groups = plan_batches([computed(encoded) for encoded in rows], config.batch_tokens)
    yield from (batch_of([rows[i] for i in group]).to(device) for group in groups)


def computed(encoded: Encoded | EncodedPair) -> int:
    """Positions that an example takes in a batch of its own."""
    if isinstance(encoded, EncodedPair):
        return 2 * (len(encoded.prompt_ids) + max(len(encoded.chosen_ids), len(encoded.rejected_ids)))
    return len(encoded.input_ids)


def batch_of(part: list) -> Batch:
    """Encoded rows, or encoded pairs, as one batch."""
    if isinstance(part[0], EncodedPair):
        return pair_batch(part)
    return make_batch([e.input_ids for e in part], [e.response_mask for e in part])
