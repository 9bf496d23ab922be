"""The scoring actor of a run in rounds: weights come in, a direction and token values go out.

The model is loaded once; each window brings it newer weights through Ray's object store.
"""

import time
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import ray
import torch

from alphatoken import direction as directions
from alphatoken import schema, storage
from alphatoken.baselines import Baseline
from alphatoken.exact import Exact
from alphatoken.model import ScoringModel, default_device, load_model
from alphatoken.pair_scoring import PairEstimator, score_pair_table
from alphatoken.rounds_config import RoundsConfig
from alphatoken.scoring import score_table
from alphatoken.suspects import TokenLosses, validation_losses
from alphatoken.token_classes import class_of_ids
from alphatoken.train_config import BY_LOSS
from alphatoken.value_propagation import ValuePropagation
from pipelines import metrics
from pipelines.cluster import MANY_DEATHS, prepare_worker
from pipelines.encode import ENCODED_AS
from pipelines.live_values import gradient_options, load_fisher, validation_batches
from pipelines.pair_generator import PAIRS, PairGenerator
from pipelines.poison import Attempt, Scored
from pipelines.shards import num_tokens
from pipelines.train_data import load_rows

COLUMNS = {kind: found.names for kind, found in ENCODED_AS.items()}


@dataclass(frozen=True)
class Snapshot:
    """What the trainer gives away at a step."""

    step: int
    weights: dict[str, torch.Tensor]  # every parameter by name
    moments: dict[str, torch.Tensor]  # AdamW's second moments (without bias) of the scored ones; may be empty


@ray.remote(max_restarts=-1, max_task_retries=MANY_DEATHS)
class WindowScorer:
    """One of `parts` actors; it holds every parts-th validation row."""

    def __init__(
        self, config: RoundsConfig, shards: list[str], part: int, parts: int, threads: int, output: str, folder: str
    ) -> None:
        """output: the run's folder, where it notes what it is about to compute (pipelines/poison.py); folder: where
        the run was started.
        """
        prepare_worker(threads)
        datasets.disable_progress_bars()
        self.config, self.output = config, output
        self.device = default_device() if config.gpus_per_actor else torch.device("cpu")
        self.scoring = load_model(config.model, config.score_dtype, self.device, config.trust_remote_code)
        self.options = gradient_options(config, self.device)
        self.validation = validation_batches(config, self.device, part, parts)
        if config.rule in BY_LOSS:
            self.class_of = torch.from_numpy(class_of_ids(config.model, config.trust_remote_code))
        self.fisher: directions.Tensors | None = None
        self.reference: directions.Tensors | None = None
        if found := load_fisher(config, torch.device("cpu")):
            self.fisher, self.reference = found
        self.rows = load_rows(shards, COLUMNS[config.data_kind]).with_format("arrow")
        self.policy_reference: ScoringModel | None = None  # dpo: what the policy is tied to
        if config.objective == "dpo":
            name = config.reference_model or config.model
            self.policy_reference = load_model(name, config.score_dtype, self.device, config.trust_remote_code)
        self.generator = PairGenerator(config, self.scoring, folder) if config.generate else None
        self.step: int | None = None

    def ready(self) -> None:
        """Answers once the actor has everything loaded."""

    def gradient(self, snapshot: Snapshot) -> directions.MeanGradient:
        """The gradient of this actor's validation rows at the snapshot."""
        self._load(snapshot)
        found = directions.mean_gradient(self.scoring, self.validation, self.options)
        tensors = {name: tensor.cpu() for name, tensor in found.tensors.items()}
        return directions.MeanGradient(tensors, found.num_rows, found.num_tokens, found.weight)

    def losses(self, snapshot: Snapshot) -> TokenLosses:
        """Losses of this actor's validation rows at the snapshot."""
        self._load(snapshot)
        return validation_losses(self.scoring, self.validation, self.class_of)

    def read(self, snapshot: Snapshot, indices: np.ndarray) -> tuple[pa.Table, pa.Table]:
        """(encoded rows with their index in the data as `row_index`, from the data or pairs generated just now;
        QUARANTINE of the prompts without a pair).
        """
        table = pa.table(self.rows[indices.tolist()]).append_column("row_index", pa.array(indices, pa.int64()))
        if self.generator is None:
            return table, schema.QUARANTINE.empty_table()
        self._load(snapshot)
        return self._generate(table, self.generator, snapshot.step)

    def _generate(self, prompts: pa.Table, generator: PairGenerator, step: int) -> tuple[pa.Table, pa.Table]:
        attempt = Attempt(self.output, prompts, self.config.batch_tokens, generator.lengths(prompts))
        pairs = [PAIRS.empty_table()]
        reasons: dict[int, str] = {}
        for part in attempt.parts():
            found, refused = generator(prompts.take(part), step)
            pairs.append(found)
            reasons |= {part[number]: reason for number, reason in refused.items()}
        attempt.end()
        return pa.concat_tables(pairs), self._put_aside(prompts, reasons | attempt.deadly, "generate")

    def score(
        self,
        snapshot: Snapshot,
        direction: directions.Tensors | None,
        drift: directions.Tensors | None,
        table: pa.Table,
    ) -> tuple[pa.Table, pa.Table]:
        """(what `read` gave, with the columns of SCORED or SCORED_PAIRS; QUARANTINE of the rows that have no values).

        Without a direction losses stand for values.
        """
        started = time.monotonic()
        self._load(snapshot)
        estimator = self._estimator(direction, drift)
        attempt = Attempt(self.output, table, self.config.batch_tokens)
        scored, failures, _ = attempt.score(lambda part: self._score(part, estimator))
        attempt.end()
        seconds = time.monotonic() - started
        metrics.count_shard(self.config.stage, {"counts": {"tokens": num_tokens(table)}, "seconds": seconds})
        good = np.ones(scored.num_rows, dtype=bool)
        good[list(failures)] = False
        return scored.filter(pa.array(good)), self._put_aside(scored, failures, "score")

    def _put_aside(self, table: pa.Table, failures: dict[int, str], stage: str) -> pa.Table:
        """QUARANTINE of the failed rows, which come from the run's encoded rows."""
        source = storage.join(self.output, "encoded")
        rows = [
            {"row_id": row["row_id"], "id": row["id"], "position": row["row_index"], "reason": failures[number]}
            for number, row in enumerate(table.select(["row_id", "id", "row_index"]).to_pylist())
            if number in failures
        ]
        return pa.Table.from_pylist([row | {"source": source, "stage": stage} for row in rows], schema.QUARANTINE)

    def _score(self, table: pa.Table, estimator: Any) -> Scored:
        tokens = self.config.batch_tokens
        if self.policy_reference is None:
            return score_table(table, estimator, tokens, self.device)
        pairs = PairEstimator(estimator, self.scoring, self.policy_reference)
        return score_pair_table(table, pairs, tokens, self.device, self.config.beta)

    def drift(self, snapshot: Snapshot) -> directions.Tensors | None:
        """F * (W - W_ref) at the snapshot, of the trainer's own weights, not rounded; None without a Fisher."""
        if self.fisher is None:
            return None
        assert self.reference is not None
        return directions.drift(snapshot.weights, self.reference, self.fisher)

    def _estimator(self, direction: directions.Tensors | None, drift: directions.Tensors | None):
        if direction is None:
            return Baseline(self.scoring, "loss")
        parameters = self.config.scored_parameters
        if self.config.estimator == "exact":
            return Exact(self.scoring, parameters, direction, drift)
        return ValuePropagation(self.scoring, parameters, direction, drift, self.config.window)

    @torch.no_grad()
    def _load(self, snapshot: Snapshot) -> None:
        if self.step == snapshot.step:
            return
        for name, parameter in self.scoring.model.named_parameters():
            parameter.copy_(snapshot.weights[name])
        self.step = snapshot.step


@ray.remote(num_cpus=0)
def combine(
    parts: list[ray.ObjectRef], snapshot: Snapshot, drift: directions.Tensors | None
) -> tuple[directions.Tensors, directions.Tensors | None]:
    """One direction from the actors' gradients, preconditioned where the snapshot has moments; the drift likewise."""
    gradients: list[directions.MeanGradient] = ray.get(parts)  # not copied: they stay in the object store
    weight = sum(found.weight for found in gradients)
    total: directions.Tensors = {}
    drift = drift and dict(drift)
    for name, first in gradients[0].tensors.items():  # one weight at a time: memory for one direction, no more
        mean = first * (gradients[0].weight / weight)
        for found in gradients[1:]:
            mean.add_(found.tensors[name], alpha=found.weight / weight)
        if snapshot.moments:
            scale = directions.adam_scale({name: snapshot.moments[name]})[name]
            mean *= scale
            if drift:
                drift[name] = drift[name] * scale
        total[name] = mean
    return total, drift
