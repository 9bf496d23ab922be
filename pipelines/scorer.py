"""The actor that scores blocks of encoded rows and writes them as shards.

A block goes through read, turn at the device, write. With a GPU an actor has two in its hands (`actor_pool`): one is
written while the next one is computed.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import torch

from alphatoken.config import ScoreConfig
from alphatoken.model import ScoringModel, default_device, load_model
from alphatoken.pair_scoring import PairEstimator, score_pair_table
from alphatoken.quantized_trunk import QuantizedTrunk
from alphatoken.scoring import build_estimator, score_table
from alphatoken.spread_trunk import SpreadTrunk
from pipelines.cluster import prepare_worker
from pipelines.direction import load_reference
from pipelines.poison import Attempt
from pipelines.shards import write_block
from pipelines.turns import Turns


@dataclass(frozen=True)
class ScorePlan:
    """What every actor is told."""

    config: ScoreConfig
    parameters: str | None  # what is scored; None for a baseline
    targets: list[str]  # names of those that get columns of their own
    direction_path: str | None
    output: str


def load_scored(config: ScoreConfig, parameters: str | None) -> ScoringModel:
    """The model where this process is to score with it."""
    device = default_device() if config.gpus_per_actor else torch.device("cpu")
    trunk = QuantizedTrunk.of(config.trunk_dtype, parameters)
    spread = SpreadTrunk.of(config.gpus_per_actor, parameters)
    return load_model(config.model, config.dtype, device, config.trust_remote_code, trunk, spread)


class Scorer:
    """The scoring actor: model, direction and drift are loaded once."""

    def __init__(self, plan: ScorePlan, threads: int) -> None:
        prepare_worker(threads)
        self.config, self.output, self.targets = plan.config, plan.output, plan.targets
        self.scoring = load_scored(plan.config, plan.parameters)
        self.device = self.scoring.device
        self.estimator = build_estimator(plan.config, self.scoring, plan.direction_path)
        self._load_more()
        self.turns = Turns()

    def _load_more(self) -> None:
        """Rows need nothing more."""

    def __call__(self, block: pa.Table) -> dict[str, list]:
        """One block of encoded rows to one shard; refused rows pass through with their reason. Returns its counts."""
        good = pc.is_null(block["reason"])
        attempt = Attempt(self.output, block.filter(good), self.config.batch_tokens)
        attempt.announce()
        refused = block.filter(pc.invert(good))
        with ExitStack() as turn:
            idle = turn.enter_context(self.turns.turn())
            started = time.monotonic()
            scored, failures, computed = attempt.score(self._score)
            seconds = time.monotonic() - started
            if not attempt.deaths:  # else the next death must be known to be this block's, not that of the next
                turn.close()
            reasons = [failures.get(index) for index in range(scored.num_rows)]
            scored = scored.set_column(scored.column_names.index("reason"), "reason", pa.array(reasons, pa.string()))
            result = pa.concat_tables([scored, refused], promote_options="default")
            cost = {
                "computed_positions": computed,
                "scoring_seconds": round(seconds, 4),
                "idle_seconds": round(idle, 4),
            }
            counts = write_block(result, self.output, cost)
            attempt.end()
        return counts

    def _score(self, table: pa.Table) -> tuple[pa.Table, dict[int, str], int]:
        config = self.config
        return score_table(table, self.estimator, config.batch_tokens, self.device, config.terms, self.targets)


class PairScorer(Scorer):
    """The scoring actor for preference pairs, with the reference model where that is another one."""

    def _load_more(self) -> None:
        reference = load_reference(self.config, self.scoring)
        self.pair_estimator = PairEstimator(self.estimator, self.scoring, reference)

    def _score(self, table: pa.Table) -> tuple[pa.Table, dict[int, str], int]:
        config = self.config
        return score_pair_table(
            table, self.pair_estimator, config.batch_tokens, self.device, config.beta, config.terms, self.targets
        )
