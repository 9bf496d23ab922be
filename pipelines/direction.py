"""The validation direction, computed once where the accelerators are, before the scoring actors start."""

import logging
from collections.abc import Iterator
from itertools import islice

import numpy as np
import ray
import torch

from alphatoken import direction as directions
from alphatoken import tensor_file, token_classes
from alphatoken.batching import Batch, make_batch, plan_batches
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.encode import check_source
from alphatoken.errors import UserError
from alphatoken.model import ScoringModel, end_of_turn_ids, fingerprint, load_model, load_tokenizer
from alphatoken.sources import data_fingerprint, plan_units
from pipelines.cluster import connect, prepare_worker, torch_threads, user_errors
from pipelines.encode import good_rows, make_encoder

logger = logging.getLogger(__name__)

ROWS_IN_MEMORY = 256  # validation rows sorted by length at a time
MAX_REASONS = 3


def run_direction(config: DirectionConfig) -> dict:
    """Compute and save the direction; returns its provenance as a dictionary."""
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    check_source(plan_units(config.validation), config, tokenizer)
    token_classes.check_class_names(config.class_weights)
    connect()
    with user_errors():
        worker = DirectionWorker.options(**one_accelerator()).remote(config, torch_threads())
        ray.get(worker.fingerprint.remote())
        return ray.get(worker.make.remote(config, config.validation, config.parameters, config.positions or "all"))


def one_accelerator() -> dict:
    """Resources of a stage that needs the model once: a GPU where the cluster has one."""
    return {"num_gpus": 1, "num_cpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}


@ray.remote
class DirectionWorker:
    """Holds the model for the questions that come before scoring: which checkpoint is it, what is the direction."""

    def __init__(self, config: ScoreConfig | DirectionConfig, threads: int) -> None:
        prepare_worker(threads)
        self.scoring: ScoringModel = load_model(config.model, config.dtype, trust_remote_code=config.trust_remote_code)
        self.encoder = make_encoder(config.model, config, config.trust_remote_code)

    def fingerprint(self) -> str:
        """Of the loaded checkpoint."""
        return fingerprint(self.scoring.model)

    def make(
        self, config: ScoreConfig | DirectionConfig, validation: list[str], parameters: str, positions: str, path: str = ""
    ) -> dict:
        """Compute the direction and save it at `path` (default: the output)."""
        options = directions.GradientOptions(
            parameters, config.normalization, positions, self._class_weights(config.class_weights)
        )
        refused: list[str] = []
        rows_per_batch = 1 if config.normalization == "sequence" else None
        batches = self._batches(validation, config.batch_tokens, refused, rows_per_batch)
        found = directions.mean_gradient(self.scoring, batches, options)
        report_refused("validation", found.num_rows, refused)
        scale = self._scale(config, parameters)
        tensors = {
            f"direction/{name}": (tensor * scale[name] if scale else tensor).cpu()
            for name, tensor in found.tensors.items()
        }
        tensors |= {f"scale/{name}": tensor.cpu() for name, tensor in scale.items()}
        provenance = tensor_file.Provenance(
            kind="direction",
            model_fingerprint=self.fingerprint(),
            parameters=parameters,
            data_fingerprint=data_fingerprint(validation),
            num_rows=found.num_rows,
            num_tokens=found.num_tokens,
            options=direction_identity(config, positions) | {"num_refused": len(refused)},
        )
        tensor_file.save(path or config.output, tensor_file.TensorFile(provenance, tensors))
        return provenance.__dict__

    def _class_weights(self, weights: dict[str, float]) -> torch.Tensor | None:
        if not weights:
            return None
        ends = end_of_turn_ids(self.scoring.model.config, self.encoder.tokenizer)
        table = token_classes.token_class_table(self.encoder.tokenizer, ends, self.encoder.vocab_size)
        per_class = np.array([weights.get(name, 1.0) for name in token_classes.TOKEN_CLASS_NAMES], dtype=np.float32)
        return torch.from_numpy(per_class[token_classes.class_ids(table)]).to(self.scoring.device)

    def _scale(self, config: ScoreConfig | DirectionConfig, parameters: str) -> directions.Tensors:
        """The AdamW preconditioner from a short run over training data; empty without one."""
        if config.preconditioner == "none":
            return {}
        files = config.preconditioner_data or getattr(config, "data", [])
        if not files:
            raise UserError("--preconditioner adam needs --preconditioner-data FILES: training rows for its moments")
        refused: list[str] = []
        rows = good_rows(plan_units(files), self.encoder, refused)
        size = config.preconditioner_rows
        batches = []
        for _ in range(config.preconditioner_batches):
            part = [encoded for _, encoded in islice(rows, size)]
            if not part:
                break
            batches.append(make_batch([e.input_ids for e in part], [e.response_mask for e in part]))
        moved = (batch.to(self.scoring.device) for batch in batches)
        return directions.adam_scale(directions.second_moments(self.scoring, moved, parameters))

    def _batches(
        self, files: list[str], batch_tokens: int, refused: list[str], rows_per_batch: int | None
    ) -> Iterator[Batch]:
        rows = good_rows(plan_units(files), self.encoder, refused)
        while part := [encoded for _, encoded in islice(rows, ROWS_IN_MEMORY)]:
            groups = (
                [[i] for i in range(len(part))]
                if rows_per_batch == 1
                else plan_batches([len(e.input_ids) for e in part], batch_tokens)
            )
            for group in groups:
                batch = make_batch([part[i].input_ids for i in group], [part[i].response_mask for i in group])
                yield batch.to(self.scoring.device)


def direction_identity(config: ScoreConfig | DirectionConfig, positions: str) -> dict:
    """The settings that a direction depends on, as JSON."""
    names = ("normalization", "class_weights", "preconditioner", "columns", "max_length", "too_long")
    settings = {name: getattr(config, name) for name in names} | {"positions": positions}
    if config.preconditioner != "none":
        more = ("preconditioner_data", "preconditioner_batches", "preconditioner_rows")
        settings |= {name: getattr(config, name) for name in more}
    return settings


def report_refused(what: str, used: int, refused: list[str]) -> None:
    """Say which rows of a small input were left out; they appear in no quarantine table."""
    if refused:
        shown = "; ".join(refused[:MAX_REASONS])
        logger.warning("%d %s rows used, %d left out: %s", used, what, len(refused), shown)
