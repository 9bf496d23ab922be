"""What a fresh direction is worth, measured on a few rows: kept beside it and told to the user."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from alphatoken import direction as directions
from alphatoken import token_classes
from alphatoken.batching import Batch, plan_batches
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.direction_health import ClassShare, agreement, class_shares, concerns
from alphatoken.encode import Encoder
from alphatoken.errors import first_line
from alphatoken.hidden_tangent import NoForwardMode
from alphatoken.model import ScoringModel
from alphatoken.pair_encode import PairEncoder
from alphatoken.sources import plan_units
from pipelines.encode import good_rows
from pipelines.validation_rows import batch_of, computed

SAMPLE_ROWS = 8  # of the validation files, and of those to be scored: more would take longer than the direction
BATCH = 2048  # computed positions

logger = logging.getLogger(__name__)


def check_direction(
    scoring: ScoringModel,
    config: ScoreConfig | DirectionConfig,
    encoder: Encoder,
    options: directions.GradientOptions,
    found: directions.MeanGradient,
    halves: list[directions.GradientSum],
    scale: directions.Tensors,
    data_pairs: bool,
) -> dict[str, Any]:
    """Class shares of the direction, and agreement of its halves on the rows to be scored, where there are some."""
    def measured(method: str) -> Measured:
        shares = {}
        if config.validation_objective == "sft":
            rows = _sample(config.validation, encoder.encode, scoring.device)
            classes = torch.from_numpy(token_classes.class_of_ids(config.model, config.trust_remote_code))
            about = (scoring, options.parameters, found.tensors, rows, classes, options.class_weights)
            shares = class_shares(*about, method=method)
        agreed = None
        data = getattr(config, "data", [])
        if data and all(half.weight for half in halves):
            rows = _sample(data, (PairEncoder(encoder) if data_pairs else encoder).encode, scoring.device)
            if sum(batch.num_response_tokens for batch in rows) > 1:
                scaled = [_scaled(half, scale) for half in halves]
                agreed = agreement(scoring, options.parameters, scaled, rows, method)
        return shares, agreed

    shares, agreed = tried(measured, scoring.dtype)
    return {
        "class_shares": {name: asdict(share) for name, share in shares.items()},
        "agreement_of_halves": agreed,
        "concerns": concerns(shares, agreed, found.num_rows),
    }


Measured = tuple[dict[str, ClassShare], float | None]


def tried(measure: Callable[[str], Measured], dtype: torch.dtype) -> Measured:
    """What can be measured: a direction must not be lost to a row, or a model, that only its check cannot take."""
    try:
        try:
            return measure("forward")
        except NoForwardMode:
            if dtype == torch.bfloat16:  # a small step would be rounded away
                raise
            return measure("central")
    except (NoForwardMode, RuntimeError, IndexError) as error:  # also out of memory, or more tokens than positions
        logger.warning("the direction was not checked: %s", first_line(error))
        return {}, None


def tell(health: dict[str, Any]) -> None:
    """Warn of a direction's concerns, on the driver."""
    for sentence in health.get("concerns", []):
        logger.warning(sentence)


def _sample(files: list[str], encode: Callable[[dict], Any], device: torch.device) -> list[Batch]:
    """The first usable rows."""
    rows = [row for _, row in islice(good_rows(plan_units(files), encode, []), SAMPLE_ROWS)]
    return [batch_of([rows[i] for i in group]).to(device) for group in plan_batches(list(map(computed, rows)), BATCH)]


def _scaled(half: directions.GradientSum, scale: directions.Tensors) -> directions.Tensors:
    return {name: tensor * scale[name] for name, tensor in half.tensors.items()} if scale else half.tensors
