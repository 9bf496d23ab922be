"""The validation direction, computed once where the accelerators are, before the scoring actors start."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

import numpy as np
import ray
import torch

from alphatoken import direction as directions
from alphatoken import tensor_file, token_classes
from alphatoken.batching import Batch, make_batch, plan_batches
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.encode import Encoder, check_source
from alphatoken.errors import UserError
from alphatoken.model import ScoringModel, fingerprint, load_model
from alphatoken.sources import data_fingerprint, plan_units
from alphatoken.tokenizer import end_of_turn_ids, load_config, load_tokenizer
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
        return ray.get(_direction_task.options(**one_accelerator()).remote(config, torch_threads()))


def one_accelerator() -> dict:
    """Resources of a stage that needs the model once: a GPU where the cluster has one."""
    return {"num_gpus": 1, "num_cpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}


@ray.remote
def _direction_task(config: DirectionConfig, threads: int) -> dict:
    prepare_worker(threads)
    scoring = load_model(config.model, config.dtype, trust_remote_code=config.trust_remote_code)
    return make_direction(scoring, config, config.parameters, config.positions or "all", config.output)


def make_direction(
    scoring: ScoringModel, config: ScoreConfig | DirectionConfig, parameters: str, positions: str, path: str
) -> dict:
    """Compute the direction from `config.validation` and save it at `path`; returns its provenance."""
    encoder = make_encoder(config.model, config, config.trust_remote_code)
    weights = None
    if config.class_weights:
        weights = class_weight_table(config.class_weights, config.model, encoder).to(scoring.device)
    options = directions.GradientOptions(parameters, config.normalization, positions, weights)
    refused: list[str] = []
    one_by_one = config.normalization == "sequence"
    batches = _validation_batches(config.validation, encoder, scoring.device, config.batch_tokens, one_by_one, refused)
    try:
        found = directions.mean_gradient(scoring, batches, options)
    except UserError as error:
        raise UserError(f"{error} {reasons(refused)}".strip()) from error
    report_refused("validation", found.num_rows, refused)
    scale = _adam_scale(scoring, encoder, config, parameters)
    tensors = {
        f"direction/{name}": (tensor * scale[name] if scale else tensor).cpu() for name, tensor in found.tensors.items()
    }
    tensors |= {f"scale/{name}": tensor.cpu() for name, tensor in scale.items()}
    provenance = tensor_file.Provenance(
        kind="direction",
        model_fingerprint=fingerprint(scoring.model),
        parameters=parameters,
        data_fingerprint=data_fingerprint(config.validation),
        num_rows=found.num_rows,
        num_tokens=found.num_tokens,
        options=direction_identity(config, positions) | {"num_refused": len(refused)},
    )
    tensor_file.save(path, tensor_file.TensorFile(provenance, tensors))
    return asdict(provenance)


def class_weight_table(weights: dict[str, float], model: str, encoder: Encoder) -> torch.Tensor:
    """Weight of each token id in the validation loss: V float32."""
    ends = end_of_turn_ids(load_config(model), encoder.tokenizer)
    table = token_classes.token_class_table(encoder.tokenizer, ends, encoder.vocab_size)
    per_class = np.array([weights.get(name, 1.0) for name in token_classes.TOKEN_CLASS_NAMES], dtype=np.float32)
    return torch.from_numpy(per_class[token_classes.class_ids(table)])


def _adam_scale(
    scoring: ScoringModel, encoder: Encoder, config: ScoreConfig | DirectionConfig, parameters: str
) -> directions.Tensors:
    """The AdamW preconditioner from a short run over training data; empty without one."""
    if config.preconditioner == "none":
        return {}
    files = config.preconditioner_data or getattr(config, "data", [])
    if not files:
        raise UserError("--preconditioner adam needs --preconditioner-data FILES: training rows for its moments")
    rows = good_rows(plan_units(files), encoder, [])
    batches = []
    while len(batches) < config.preconditioner_batches:
        part = [encoded for _, encoded in islice(rows, config.preconditioner_rows)]
        if not part:
            break
        batches.append(make_batch([e.input_ids for e in part], [e.response_mask for e in part]))
    moved = (batch.to(scoring.device) for batch in batches)
    return directions.adam_scale(directions.second_moments(scoring, moved, parameters))


def _validation_batches(
    files: list[str], encoder: Encoder, device: torch.device, batch_tokens: int, one_by_one: bool, refused: list[str]
) -> Iterator[Batch]:
    rows = good_rows(plan_units(files), encoder, refused)
    while part := [encoded for _, encoded in islice(rows, ROWS_IN_MEMORY)]:
        lengths = [len(encoded.input_ids) for encoded in part]
        for group in [[i] for i in range(len(part))] if one_by_one else plan_batches(lengths, batch_tokens):
            yield make_batch([part[i].input_ids for i in group], [part[i].response_mask for i in group]).to(device)


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
        logger.warning("%d %s rows used, %d left out %s", used, what, len(refused), reasons(refused))


def reasons(refused: list[str]) -> str:
    """The first few, in brackets; nothing where no row was refused."""
    return f"({'; '.join(refused[:MAX_REASONS])})" if refused else ""
