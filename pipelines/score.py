"""Rows in, valued rows out: encode on CPU tasks, score on an actor pool that writes the shards.

    files -> encode_units (CPU tasks) -> Scorer (actors, model loaded once) -> shards with commit records

Every block is a run of consecutive rows and becomes one shard with a commit record; a run that was cut off starts
again with the rows that no record names. The driver sees counts only. A preference pair is one row all the way; the
actor scores its branches and, in the same pass, the reference's log-probabilities of both.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.data

from alphatoken import manifest as manifests
from alphatoken import schema, storage, tensor_file, token_classes
from alphatoken.checkpoint_files import files_fingerprint, settings_fingerprint
from alphatoken.config import STABILITY_NEEDS, DataOptions, ScoreConfig
from alphatoken.encode import check_source
from alphatoken.errors import UserError
from alphatoken.model import fingerprint, planned_dtype
from alphatoken.pair_encode import check_pair_source, is_pair_data
from alphatoken.run_folder import RunFolder
from alphatoken.scoring import check_stability, default_parameters
from alphatoken.sources import (
    ReadUnit,
    check_outside,
    column_names,
    data_fingerprint,
    file_bytes,
    first_rows,
    plan_units,
)
from alphatoken.targets import validation_files
from alphatoken.tokenizer import check_same_vocabulary, load_tokenizer
from pipelines import metrics
from pipelines.blocks import map_blocks
from pipelines.cluster import (
    MANY_DEATHS,
    actor_pool,
    check_gpus,
    connect,
    prepare_worker,
    room_for,
    torch_threads,
    user_errors,
)
from pipelines.direction import check_validation, load_reference, make_direction
from pipelines.direction_checks import tell
from pipelines.direction_identity import direction_identity, validation_fingerprint
from pipelines.encode import EncodePlan, encoded_dataset
from pipelines.progress import Phase, Tally, get_all, tick_of
from pipelines.scorer import PairScorer, ScorePlan, Scorer, load_scored
from pipelines.shards import total_counts

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 5  # of an encoded row: int32 id and one byte of mask
SMALLEST_SHARD, LARGEST_SHARD = 4_096, 1_048_576  # tokens
SHARDS = 256  # of an input between: every actor has work, and they end at about the same time
BATCHES, SHARDS_PER_ACTOR = 4, 4  # at least so many batches in a shard, where there are at least so many shards
BYTES_OF_TEXT = 4  # a token of a text file, about
# Settings that change where and how fast, but not what is written.
NOT_IDENTITY = {"output", "overwrite", "num_actors", "gpus_per_actor", "cpus_per_actor", "batch_tokens", "shard_tokens"}

Progress = Callable[[dict], None]  # called with running counts after every shard


def run_score(config: ScoreConfig, progress: Progress | None = None, preparing: Phase | None = None) -> dict:
    """Write the SCORED folder `config.output` and return its manifest. Resumes a run that was cut off.

    progress: told the counts after every shard; preparing: told how far the direction is, before the first one.
    Raises UserError for anything that can be known to be wrong before the actors start.
    """
    started = time.monotonic()
    units = plan_units(config.data)
    pairs = is_pair_data(config.objective, units, config.columns)
    parameters = check_inputs(config, units, pairs)
    folder = RunFolder(storage.absolute(config.output))
    connect(room_for(config.actor_range[1], config.cpus_per_actor))
    with user_errors():
        prepared = _prepare(config, parameters, pairs, folder, preparing)
        if prepared.state == "finished":
            logger.info("%s is already finished", folder.uri)
            return folder.manifest()
        known: dict = {"direction_health": {}}
        targets: list[str] = []
        if prepared.direction_path:
            provenance = tensor_file.read_provenance(prepared.direction_path, "direction")
            known = {"direction_health": provenance.health, "loss_profile": provenance.loss_profile}
            targets = list(provenance.targets) if parameters else []
            tell(provenance.health)
        _write_token_classes(config, folder)
        plan = ScorePlan(config, parameters, targets, prepared.direction_path, folder.uri)
        _score_units(units, plan, pairs, folder, progress)
    counts = total_counts(folder)
    workers = metrics.time_per_worker(folder.commits())
    manifest = manifests.build_manifest(
        "score", config.model_dump(mode="json"), counts, prepared.fingerprints, time.monotonic() - started,
        extra={"parameters": parameters, "pairs": pairs, **known, "workers": workers}
        | ({"targets": targets} if targets else {}),
    )  # fmt: skip
    columns = storage.read_schema(storage.list_shards(folder.uri)[0])
    folder.finish(manifest, manifests.data_card("score", manifest, columns))
    return manifest


def check_inputs(config: ScoreConfig, units: list[ReadUnit], pairs: bool) -> str | None:
    """Everything that can be known before a model is loaded. Returns what is scored; None for a baseline."""
    check_gpus("--num-actors", config.actor_range[0], config.gpus_per_actor)
    check_outside(config.output, [*config.data, *validation_files(config.validation)])
    check_stability(config)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    if pairs:
        check_pair_source(units, config)
    else:
        check_source(units, config, tokenizer)
        uses_reference = config.estimator == "excess_loss" or config.validation_objective == "dpo"
        if config.reference_model and not config.fisher and not uses_reference:
            raise UserError(STABILITY_NEEDS)
    _check_kept(config, units, pairs)
    if config.reference_model:
        check_same_vocabulary(config.model, config.reference_model, config.trust_remote_code)
    if config.validation:
        check_validation(config)
    token_classes.check_class_names(config.class_weights)
    if config.estimator not in ("exact", "value_propagation"):
        return None
    parameters = config.parameters
    for path, kind in ((config.direction, "direction"), (config.fisher, "fisher")):
        if path:
            found = tensor_file.read_provenance(path, kind).parameters
            parameters = parameters or found
            if found != parameters:
                raise UserError(f"{path} covers --parameters {found}, this run scores {parameters}; make it again")
    parameters = parameters or default_parameters(config.estimator)
    if config.gpus_per_actor > 1 and parameters in ("all", "all-linear"):
        raise UserError(
            f"--gpus-per-actor {config.gpus_per_actor:g}: several GPUs hold a model whose last layers are scored; "
            f"--parameters {parameters} needs a GPU that holds it whole. Give --parameters last-layers:K"
        )
    return parameters


def _check_kept(config: ScoreConfig, units: list[ReadUnit], pairs: bool) -> None:
    """Kept columns must not be columns of the output, which would then be theirs, and some file must have them."""
    made: list = [*schema.SCORED_PAIRS, *schema.MASKED_PAIRS_EXTRA] if pairs else [*schema.SCORED, *schema.MASKED_EXTRA]
    taken = {*(field.name for field in [*made, schema.WEIGHTS]), *schema.TERMS}  # by now, or once it is masked
    if len(set(config.keep_columns)) < len(config.keep_columns):
        raise UserError(f"--keep-columns {' '.join(config.keep_columns)}: a column is named twice")
    for name in config.keep_columns:
        if name in taken or name.startswith(("adaptation.", "mean_adaptation.")):
            raise UserError(f"--keep-columns {name}: the output has a column of that name of its own; leave it out")
    missing = set(config.keep_columns)
    rows = first_rows(units)
    while missing and (found := next(rows, None)):
        missing -= found[1].keys()
    if missing:
        raise UserError(
            f"--keep-columns {' '.join(sorted(missing))}: the first row of no data file has such a column; the first "
            f"has {', '.join(sorted(column_names(units[0])))}"
        )


@dataclass(frozen=True)
class _Prepared:
    state: str  # new, resume or finished
    fingerprints: dict
    direction_path: str | None


def _prepare(
    config: ScoreConfig, parameters: str | None, pairs: bool, folder: RunFolder, progress: Phase | None
) -> _Prepared:
    """Identify the checkpoint, open the output folder for this run and make the direction if none was given."""
    resources = {"num_cpus": config.cpus_per_actor, "num_gpus": config.gpus_per_actor}
    counter = Tally.remote() if progress else None
    task = _prepare_task.options(**resources, max_retries=MANY_DEATHS)
    return get_all([task.remote(config, parameters, pairs, folder.uri, torch_threads(), counter)], counter, progress)[0]


@ray.remote
def _prepare_task(
    config: ScoreConfig, parameters: str | None, pairs: bool, output: str, threads: int, counter: Any
) -> _Prepared:
    prepare_worker(threads)
    scoring = load_scored(config, parameters)
    positions = config.positions_for(config.estimator)
    fingerprints = {"model": fingerprint(scoring.model), **input_fingerprints(config)}
    reference = load_reference(config, scoring) if pairs or config.validation_objective == "dpo" else None
    if pairs:  # whose log-probabilities the rows will carry
        fingerprints["reference_model"] = fingerprint(reference.model) if reference else fingerprints["model"]
    if config.direction:
        provenance = tensor_file.read_provenance(config.direction, "direction")
        tensor_file.check_matches(provenance, config.direction, fingerprints["model"], parameters)
    folder = RunFolder(output)
    state = folder.open(score_identity(config, parameters, fingerprints), config.overwrite)
    path = config.direction
    if state != "finished" and config.validation and parameters:
        path = storage.join(output, "direction.safetensors")
        if not storage.exists(path):
            make_direction(scoring, config, parameters, positions, path, reference, pairs, tick_of(counter))
    return _Prepared(state, fingerprints, path)


def input_fingerprints(config: ScoreConfig) -> dict:
    """Of everything but the models' weights."""
    return {
        "model_settings": settings_fingerprint(config.model, config.trust_remote_code),
        "dtype": planned_dtype(config.dtype, config.gpus_per_actor),
        "data": data_fingerprint(config.data),
        "validation": validation_fingerprint(config.validation) if config.validation else None,
        "direction": _file_identity(config.direction, "direction"),
        "fisher": _file_identity(config.fisher, "fisher"),
        "direction_settings": direction_identity(config, config.positions_for(config.estimator)),
        **_training_rows(config),
        **_reference_files(config),
    }


def _training_rows(config: ScoreConfig) -> dict:
    """Those behind a preconditioner, where they are not the data."""
    given = config.preconditioner_data
    return {"preconditioner_data": data_fingerprint(given)} if given else {}


def _reference_files(config: ScoreConfig) -> dict:
    """Of a model that only the actors load."""
    if config.estimator != "excess_loss" or not config.reference_model:
        return {}
    return {"reference_files": files_fingerprint(config.reference_model, config.trust_remote_code)}


def score_identity(config: ScoreConfig, parameters: str | None, fingerprints: dict) -> dict:
    """What the output folder keeps of the run, to know it again."""
    settings = config.model_dump(mode="json", exclude=NOT_IDENTITY) | {"parameters": parameters}
    return {"stage": "score", "config": settings, "fingerprints": fingerprints}


def _file_identity(path: str | None, kind: str) -> dict | None:
    return tensor_file.read_provenance(path, kind).__dict__ if path else None


def _write_token_classes(config: ScoreConfig, folder: RunFolder) -> None:
    table = token_classes.model_token_classes(config.model, config.trust_remote_code)
    storage.write_table(table, storage.join(folder.uri, "token_classes.parquet"))


def _score_units(
    units: list[ReadUnit], score_plan: ScorePlan, pairs: bool, folder: RunFolder, progress: Progress | None
) -> None:
    config = score_plan.config
    finished = tuple((first, last) for first, last in folder.finished_row_ids())
    if finished:
        logger.info("resuming: %d rows were already scored", sum(last - first + 1 for first, last in finished))
    options = DataOptions(**config.model_dump(include=set(DataOptions.model_fields)))
    kind = "pairs" if pairs else "rows"
    plan = EncodePlan(config.model, config.trust_remote_code, options, tuple(config.keep_columns), finished, kind)
    low, high = config.actor_range
    threads = torch_threads(high, config.cpus_per_actor)
    scored = map_blocks(
        encoded_dataset(units, plan, BYTES_PER_TOKEN * shard_tokens(config, units)),
        PairScorer if pairs else Scorer,
        fn_constructor_args=(score_plan, threads),
        zero_copy_batch=True,
        compute=actor_pool(low, high, ahead=config.gpus_per_actor > 0),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
    )
    total: Counter = Counter()
    for record in folder.commits():
        total.update(record["counts"])
    for row in scored.iter_rows():
        total.update({name: value for name, value in row.items() if isinstance(value, int | float)})
        if progress:
            progress(dict(total))


def shard_tokens(config: ScoreConfig, units: list[ReadUnit]) -> int:
    """About how many tokens a shard has. Within one, rows are sorted by length: a few batches' worth have little
    padding (benchmarks/padding.py). Small inputs get smaller ones, so that every actor has work.
    """
    if config.shard_tokens:
        return config.shard_tokens
    tokens = file_bytes(units, "jsonl", "parquet") // BYTES_OF_TEXT
    sorted_well = min(BATCHES * config.batch_tokens, tokens // (SHARDS_PER_ACTOR * config.actor_range[1]))
    return min(max(tokens // SHARDS, sorted_well, SMALLEST_SHARD), LARGEST_SHARD)
