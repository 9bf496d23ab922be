"""The validation direction, computed once where the accelerators are, before the scoring actors start."""

import logging
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import ray
import torch

from alphatoken import direction as directions
from alphatoken import storage, tensor_file, token_classes
from alphatoken.batching import Batch
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.encode import Encoder, check_source
from alphatoken.errors import UserError
from alphatoken.exact import Exact, choose_method
from alphatoken.model import ScoringModel, fingerprint, load_model
from alphatoken.model_encoder import make_encoder
from alphatoken.pair_direction import PairWeights
from alphatoken.pair_encode import PairEncoder, check_pair_source, is_pair_data
from alphatoken.quantized_trunk import QuantizedTrunk
from alphatoken.schema import BRANCHES
from alphatoken.sources import check_outside, data_fingerprint, plan_units
from alphatoken.suspects import LossProfile, TokenLosses
from alphatoken.targets import files_by_target, validation_files
from alphatoken.tokenizer import check_same_vocabulary, load_tokenizer
from pipelines import metrics
from pipelines.cluster import MANY_DEATHS, connect, prepare_worker, torch_threads, user_errors
from pipelines.direction_checks import check_direction, tell
from pipelines.direction_identity import NO_TRAINING_ROWS, direction_provenance, direction_run, preconditioner_files
from pipelines.encode import good_rows
from pipelines.kept_sum import KeptSums, open_parts
from pipelines.progress import Phase, Tally, Tick, counted, get_all, no_tick, tick_of
from pipelines.refused import Refused, died, reasons, report_refused, write_refused
from pipelines.validation_rows import batch_of, batches_of, computed, profiled_losses, validation_blocks

logger = logging.getLogger(__name__)

VALIDATION_ROWS = "validation rows"  # what is counted


def run_direction(config: DirectionConfig, progress: Phase | None = None) -> dict:
    """Compute and save the direction; returns its provenance as a dictionary, with `already_finished` where nothing was
    left to do. Goes on with a run that was cut off.
    """
    check_direction_inputs(config)
    config = config.model_copy(update={"output": storage.absolute(config.output)})
    connect()
    counter = Tally.remote() if progress else None
    with user_errors():
        task = _direction_task.options(**one_accelerator(), max_retries=MANY_DEATHS)
        task = task.remote(config, torch_threads(), counter)
        [provenance] = get_all([task], counter, progress)
    tell(provenance["health"])
    return provenance


def check_direction_inputs(config: DirectionConfig) -> None:
    """Everything that is known without the weights. Raises UserError."""
    check_validation(config)
    check_outside(config.output, [*validation_files(config.validation), *config.preconditioner_data])
    if config.reference_model:
        check_same_vocabulary(config.model, config.reference_model, config.trust_remote_code)
    token_classes.check_class_names(config.class_weights)
    if config.preconditioner == "none":
        return
    if not config.preconditioner_data:
        raise UserError(NO_TRAINING_ROWS)
    units = plan_units(config.preconditioner_data)
    if is_pair_data("auto", units, config.columns):
        check_pair_source(units, config)
    else:
        check_source(units, config, load_tokenizer(config.model, config.trust_remote_code))


def check_validation(config: ScoreConfig | DirectionConfig) -> None:
    """Whether the validation files have rows, or pairs, that can be used. Raises UserError."""
    for files in files_by_target(config.validation).values():
        units = plan_units(files)
        if config.validation_objective == "dpo":
            check_pair_source(units, config)
        else:
            check_source(units, config, load_tokenizer(config.model, config.trust_remote_code))


def one_accelerator() -> dict:
    """Resources of a stage that needs the model once: a GPU where the cluster has one."""
    return {"num_gpus": 1, "num_cpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}


@ray.remote
def _direction_task(config: DirectionConfig, threads: int, counter: Any = None) -> dict:
    prepare_worker(threads)
    trunk = QuantizedTrunk.of(config.trunk_dtype, config.parameters)
    scoring = load_model(config.model, config.dtype, trust_remote_code=config.trust_remote_code, trunk=trunk)
    reference = load_reference(config, scoring)
    positions, tick = config.positions or "all", tick_of(counter)
    return make_direction(scoring, config, config.parameters, positions, config.output, reference, tick=tick)


def load_reference(config: ScoreConfig | DirectionConfig, scoring: ScoringModel) -> ScoringModel | None:
    """The reference of pairs; None where it is the model itself, of which every log-ratio is zero."""
    if config.reference_model is None or config.reference_model == config.model:
        return None
    reference = load_model(config.reference_model, config.dtype, scoring.device, config.trust_remote_code)
    return None if fingerprint(reference.model) == fingerprint(scoring.model) else reference


def make_direction(
    scoring: ScoringModel,
    config: ScoreConfig | DirectionConfig,
    parameters: str,
    positions: str,
    path: str,
    reference: ScoringModel | None = None,
    data_pairs: bool = False,
    tick: Tick = no_tick,
) -> dict:
    """Compute the direction of every target of `config.validation` and save them at `path`; returns as run_direction.

    What was added up before is kept beside `path` and used again. Raises UserError where another run's direction, or
    parts of one, are there, unless `config.overwrite`.

    reference: of the DPO losses; None: the model itself. data_pairs: the rows to be scored are pairs. tick: counts
    validation rows.
    """
    started = time.monotonic()
    dtype = str(scoring.dtype).removeprefix("torch.")
    run = direction_run(config, parameters, positions, fingerprint(scoring.model), dtype)
    if there := tensor_file.finished(path, "direction", run, config.overwrite):
        logger.info("%s is already finished", path)
        return asdict(there) | {"already_finished": True}
    folder = open_parts(path, {"stage": "direction", **run}, config.overwrite)
    sums = KeptSums(folder, config.batch_tokens, scoring.device)
    encoder = make_encoder(config.model, config, config.trust_remote_code)
    weights = None
    if config.class_weights:
        weights = class_weight_table(config.class_weights, config.model, config.trust_remote_code).to(scoring.device)
    options = directions.GradientOptions(parameters, config.normalization, positions, weights)
    pairs = PairWeights(scoring, reference, config.beta)
    weigh = pairs if config.validation_objective == "dpo" else None
    gradients: dict[str, _Gradients] = {}
    for target, files in files_by_target(config.validation).items():
        own = config.model_copy(update={"validation": files})
        gradients[target] = _gradients(scoring, own, encoder, options, weigh, sums, len(gradients), tick)
    tick("checks of the direction", 0)
    scale = _on_cpu(_adam_scale(scoring, encoder, config, parameters, pairs if data_pairs else None))
    tensors = {f"scale/{name}": tensor for name, tensor in scale.items()}
    about = {}
    for target, part in gradients.items():
        direction = {name: g * scale[name] if scale else g for name, g in part.found.tensors.items()}
        group = tensor_file.group_of("direction", target)
        tensors |= {f"{group}/{name}": tensor for name, tensor in direction.items()}
        moved = _is_moved(config, scoring)
        about[target] = {
            "data_fingerprint": data_fingerprint(part.config.validation),
            "num_rows": part.found.num_rows,
            "num_tokens": part.found.num_tokens,
            "num_refused": len(part.refused),
            "health": check_direction(
                scoring, part.config, encoder, options, part.found, part.halves, scale, data_pairs
            ),
            "central_step": Exact(scoring, parameters, direction, method="central").central_step if moved else None,
        }
    provenance = replace(direction_provenance(run, about), loss_profile=_loss_profile(list(gradients.values())))
    write_refused(path, "direction", [row for part in gradients.values() for row in part.refused])
    tensor_file.save(path, tensor_file.TensorFile(provenance, tensors))
    storage.remove_tree(folder.uri)
    metrics.count_file("direction", asdict(provenance), time.monotonic() - started)
    return asdict(provenance)


@dataclass(frozen=True)
class _Gradients:
    """What the validation rows of one target have given."""

    config: ScoreConfig | DirectionConfig  # with the files of this target alone
    halves: list[directions.GradientSum]
    found: directions.MeanGradient
    refused: list[Refused]
    losses: TokenLosses | None  # of SFT


def _loss_profile(parts: list[_Gradients]) -> dict:
    """Of the validation rows of all targets, as JSON; empty for pairs."""
    losses = [part.losses for part in parts if part.losses is not None]
    return LossProfile.of(TokenLosses.joined(losses)).to_json() if losses else {}


def _gradients(
    scoring: ScoringModel,
    config: ScoreConfig | DirectionConfig,
    encoder: Encoder,
    options: directions.GradientOptions,
    weigh: PairWeights | None,
    sums: KeptSums,
    target: int,
    tick: Tick,
) -> _Gradients:
    def add(rows: list[Any], so_far: directions.GradientSum) -> directions.GradientSum:
        batches = batches_of(config, rows, scoring.device)
        batches = counted(batches, tick, VALIDATION_ROWS, _rows_in if weigh is None else _pairs_in)
        return directions.gradient_sum(scoring, batches, options, weigh, so_far)

    refused: list[Refused] = []
    killed: dict[int, str] = {}
    halves = []
    for half in range(2):
        blocks = validation_blocks(config, encoder, refused, half)
        found, deadly = sums.over(2 * target + half, blocks, add, computed, tick, VALIDATION_ROWS)
        halves.append(found)
        killed |= deadly
    refused += died(plan_units(config.validation), killed)
    try:
        mean = (halves[0] + halves[1]).mean()
    except UserError as error:
        raise UserError(f"{error} {reasons(refused)}".strip()) from error
    report_refused("validation", mean.num_rows, refused)
    losses = None
    if config.validation_objective == "sft":
        losses = profiled_losses(scoring, config, encoder, killed)
    # Kept outside the accelerator: it has room for the sums of one target.
    halves = [replace(half, tensors=_on_cpu(half.tensors)) for half in halves]
    return _Gradients(config, halves, replace(mean, tensors=_on_cpu(mean.tensors)), refused, losses)


def _on_cpu(tensors: directions.Tensors) -> directions.Tensors:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _rows_in(batch: Batch) -> int:
    return batch.input_ids.shape[0]


def _pairs_in(batch: Batch) -> int:
    return batch.input_ids.shape[0] // len(BRANCHES)


def _is_moved(config: ScoreConfig | DirectionConfig, scoring: ScoringModel) -> bool:
    """Whether float32 weights will be moved along the direction, as far as the configuration says."""
    if scoring.dtype != torch.float32 or getattr(config, "estimator", "exact") != "exact":
        return False
    method, tangent_dtype = (getattr(config, name, None) for name in ("method", "tangent_dtype"))
    return choose_method(method or "auto", scoring.dtype, tangent_dtype) == "central"


def class_weight_table(weights: dict[str, float], model: str, trust_remote_code: bool) -> torch.Tensor:
    """Weight of each token id in the validation loss: V float32."""
    per_class = np.array([weights.get(name, 1.0) for name in token_classes.TOKEN_CLASS_NAMES], dtype=np.float32)
    return torch.from_numpy(per_class[token_classes.class_of_ids(model, trust_remote_code)])


def _adam_scale(
    scoring: ScoringModel,
    encoder: Encoder,
    config: ScoreConfig | DirectionConfig,
    parameters: str,
    weigh: PairWeights | None,
) -> directions.Tensors:
    """The AdamW preconditioner from a short run over training data; empty without one."""
    if config.preconditioner == "none":
        return {}
    units = plan_units(preconditioner_files(config))
    if weigh is None and is_pair_data("auto", units, config.columns):  # --preconditioner-data of `direction`
        weigh = PairWeights(scoring, load_reference(config, scoring), config.beta)
    rows = good_rows(units, (encoder if weigh is None else PairEncoder(encoder)).encode, [])
    batches: list[Batch] = []
    while len(batches) < config.preconditioner_batches:
        part = [encoded for _, encoded in islice(rows, config.preconditioner_rows)]
        if not part:
            break
        batches.append(batch_of(part))
    moved = (batch.to(scoring.device) for batch in batches)
    return directions.adam_scale(directions.second_moments(scoring, moved, parameters, weigh))
