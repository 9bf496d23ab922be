"""What can be known to be wrong with a training run before a worker starts, and the held-out rows."""

import logging
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

from alphatoken import manifest as manifests
from alphatoken import schema, storage
from alphatoken.adapters import base_of
from alphatoken.checkpoint_files import files_fingerprint
from alphatoken.encode import check_source
from alphatoken.errors import UserError
from alphatoken.model_encoder import make_encoder
from alphatoken.run_folder import manifest_of
from alphatoken.sources import check_outside, data_fingerprint, plan_units
from alphatoken.token_classes import token_class_table
from alphatoken.tokenizer import check_same_vocabulary, load_config, load_tokenizer
from alphatoken.train_config import TrainConfig
from pipelines.encode import good_rows
from pipelines.live_values import check_live, data_options, encode_data
from pipelines.lora_targets import check_lora_targets
from pipelines.refused import Refused, reasons, report_refused
from pipelines.train_data import DPO_COLUMNS, REFERENCE_COLUMNS, REFERENCE_TOKENS, SFT_COLUMNS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainPlan:
    """What the checks found out."""

    data: str | list[str]  # absolute folder, or the files that are still to be encoded
    shards: list[str]
    columns: list[str]  # of the data
    num_rows: int
    stored_reference: bool  # dpo: the data's reference log-probabilities are used
    evaluation_shards: list[str] | None  # of a folder; None: files to encode, or no evaluation
    fingerprints: dict


def check_train(config: TrainConfig, load_models: bool = True) -> TrainPlan:
    """Raises UserError with the first thing that is wrong.

    load_models: whether --reference-model is compared with the one behind the data's log-probabilities.
    """
    missing = [name for name in ("trl", "peft", "accelerate") if not find_spec(name)]
    if missing:
        raise UserError(f"training needs {', '.join(missing)}: pip install 'alphatoken[train]'")
    for source in config.data:
        if storage.same_place(storage.absolute(source), storage.absolute(config.output)):
            raise UserError(f"--output {config.output} is the data folder; give another one")
    check_outside(config.output, [*config.data, *config.validation, *config.evaluation])
    if config.reference_model:
        check_same_vocabulary(config.model, config.reference_model, config.trust_remote_code)
    live = check_live(config) if config.validation else {}
    plan = _plan_files(config) if config.trains_on_files else _plan_folder(config, load_models)
    check_lora_targets(config)
    return replace(plan, fingerprints=plan.fingerprints | live | _checkpoints(config))


def _checkpoints(config: TrainConfig) -> dict:
    """Of the models by their files: the weights are loaded by the workers alone, and may be large."""
    named = {"model_files": config.model, "reference_model_files": config.reference_model}
    return {key: files_fingerprint(name, config.trust_remote_code) for key, name in named.items() if name}


def _plan_files(config: TrainConfig) -> TrainPlan:
    """A plan without rows: they are encoded once Ray runs."""
    fingerprints = {"data": data_fingerprint(config.data), "evaluation": None}
    evaluation_shards = None
    if config.evaluation:
        evaluation_shards, fingerprints["evaluation"] = _check_evaluation(config, False)
    return TrainPlan(config.data, [], [], 0, False, evaluation_shards, fingerprints)


def with_encoded_rows(config: TrainConfig, plan: TrainPlan, output: str) -> TrainPlan:
    """The plan with the shards of its files, encoded into `output` (Ray has to run)."""
    manifest = encode_data(config, output)
    shards = storage.list_shards(output)
    num_rows = manifest["counts"]["rows_out"]
    _check_workers(config, num_rows)
    return replace(plan, shards=shards, columns=storage.read_schema(shards[0]).names, num_rows=num_rows)


def _plan_folder(config: TrainConfig, load_models: bool) -> TrainPlan:
    data = storage.absolute(config.folder)
    masked = manifest_of(data, "mask", "--data")
    shards = storage.list_shards(data)
    columns = _check_columns(shards[0], config)
    num_rows = _count_rows(shards)
    _check_workers(config, num_rows)
    _check_model(config, data, masked)
    found = masked.get("fingerprints", {})
    fingerprints = {
        "masked_manifest": manifests.fingerprint(masked),
        "scored_model": found.get("model"),
        "evaluation": None,
    }
    theirs = found.get("reference_model")
    stored = config.objective == "dpo" and _check_reference(config, shards[0], theirs, load_models)
    evaluation_shards = None
    if config.evaluation:
        evaluation_shards, fingerprints["evaluation"] = _check_evaluation(config, stored)
    return TrainPlan(data, shards, columns, num_rows, stored, evaluation_shards, fingerprints)


def _check_workers(config: TrainConfig, num_rows: int) -> None:
    if config.num_workers > num_rows:
        raise UserError(
            f"--num-workers {config.num_workers}: {config.folder} has only {num_rows} rows; use fewer workers"
        )


def _check_columns(shard: str, config: TrainConfig) -> list[str]:
    names = storage.read_schema(shard).names
    wanted = SFT_COLUMNS if config.objective == "sft" else DPO_COLUMNS
    missing = [name for name in wanted if name not in names]
    if missing:
        other = "dpo" if config.objective == "sft" else "sft"
        fits = set(DPO_COLUMNS if other == "dpo" else SFT_COLUMNS) <= set(names)
        hint = f"this is data for --objective {other}" if fits else "mask it again"
        raise UserError(
            f"{config.folder} lacks the columns {', '.join(missing)} for --objective {config.objective}: {hint}"
        )
    return names


def _count_rows(shards: list[str]) -> int:
    return sum(storage.read_table(shard, []).num_rows for shard in shards)


def _check_model(config: TrainConfig, data: str, masked: dict) -> None:
    """The model must be of the architecture and vocabulary that the data was scored with. Weights may have moved."""
    ours = load_config(config.model, config.trust_remote_code)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    scored_with = masked.get("scored", {}).get("config", {}).get("model")
    theirs = _config_or_none(scored_with, config.trust_remote_code)
    if theirs is not None:
        for name in ("model_type", "hidden_size", "num_hidden_layers"):
            old, new = (getattr(found.get_text_config(), name, None) for found in (theirs, ours))
            if old != new:
                raise UserError(
                    f"{config.folder} was scored with {scored_with} ({name} {old}), but --model {config.model} has "
                    f"{name} {new}: score and mask the data with the model that is trained"
                )
    uri = storage.join(data, "token_classes.parquet")
    if storage.exists(uri):
        theirs_text = storage.read_table(uri, ["text"])["text"]
        ours_text = token_class_table(tokenizer, [], ours.get_text_config().vocab_size)["text"]
        if len(theirs_text) != len(ours_text):
            raise UserError(
                f"{config.folder} was masked for a vocabulary of {len(theirs_text)} tokens, --model {config.model} has "
                f"{len(ours_text)}: score and mask the data with the model that is trained"
            )
        differing = pc.not_equal(theirs_text, ours_text).to_numpy().nonzero()[0]
        if len(differing):
            raise UserError(
                f"{config.folder} was masked for another tokenizer than --model {config.model} has: {len(differing)} "
                f"of {len(ours_text)} tokens read otherwise, the first is id {differing[0]}"
            )


def _config_or_none(name: str | None, trust_remote_code: bool):
    """Where the scoring model still is: it may have been moved or deleted since. Of an adapter: of its base model."""
    if not name:
        return None
    try:
        return load_config(base_of(name), trust_remote_code)
    except UserError:
        logger.info(
            "the model that the data was scored with (%s) is not there any more; its architecture is unknown", name
        )
        return None


def _check_reference(config: TrainConfig, shard: str, stored_fingerprint: str | None, load_models: bool) -> bool:
    """Whether the data's reference log-probabilities are used. UserError where there is no reference at all."""
    stored = set(REFERENCE_COLUMNS) <= set(storage.read_schema(shard).names)
    if stored and (why := _why_sums_are_no_use(config, shard)):
        if not (config.reference_model or config.lora_rank):
            raise UserError(
                f"{config.folder} has reference log-probabilities of whole responses only, and {why}; "
                "give --reference-model"
            )
        return False
    if stored and config.reference_model and load_models:
        return _same_reference(config.reference_model, config, stored_fingerprint)
    if not stored and not (config.reference_model or config.lora_rank):
        raise UserError(
            f"{config.folder} has no reference log-probabilities ({', '.join(REFERENCE_COLUMNS)}); "
            "give --reference-model"
        )
    return stored


def _why_sums_are_no_use(config: TrainConfig, shard: str) -> str | None:
    """Where a shard has reference log-probabilities of whole responses only, and training needs them per token."""
    if not (config.dpo_mask == "ratio" or config.max_length):
        return None
    found = storage.read_schema(shard)
    if set(REFERENCE_TOKENS) <= set(found.names) or all(types.is_list(found.field(n).type) for n in REFERENCE_COLUMNS):
        return None
    return "--dpo-mask ratio needs them per token" if config.dpo_mask == "ratio" else "--max-length cuts responses"


def _same_reference(name: str, config: TrainConfig, stored_fingerprint: str | None) -> bool:
    from alphatoken.model import fingerprint
    from pipelines.train_worker import load_for_training

    same = fingerprint(load_for_training(name, config)) == stored_fingerprint
    if not same:
        logger.warning(
            "the reference log-probabilities in %s are not known to be of %s: they are computed again",
            config.folder, config.reference_model,
        )  # fmt: skip
    return same


def _check_evaluation(config: TrainConfig, stored_reference: bool) -> tuple[list[str] | None, str]:
    """(shards of a folder that we wrote, or None for files to encode; fingerprint)."""
    first = storage.absolute(config.evaluation[0])
    is_folder = len(config.evaluation) == 1 and storage.exists(storage.join(first, "manifest.json"))
    if not is_folder:
        if config.objective == "dpo":
            raise UserError("--evaluation of --objective dpo is a folder that `mask` wrote")
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        units = plan_units(config.evaluation)
        check_source(units, data_options(config), tokenizer)
        return None, data_fingerprint(units)
    shards = storage.list_shards(first)
    wanted = {"input_ids", "response_mask"} if config.objective == "sft" else set(DPO_COLUMNS)
    if stored_reference:
        wanted |= set(REFERENCE_COLUMNS)
    missing = wanted - set(storage.read_schema(shards[0]).names)
    if missing:
        raise UserError(f"--evaluation {config.evaluation[0]} lacks the columns {', '.join(sorted(missing))}")
    if stored_reference and (why := _why_sums_are_no_use(config, shards[0])):
        raise UserError(
            f"--evaluation {config.evaluation[0]} has reference log-probabilities of whole responses only, and {why}; "
            "score and mask it anew"
        )
    return shards, manifests.fingerprint(storage.read_json(storage.join(first, "manifest.json")))


def write_evaluation(config: TrainConfig, plan: TrainPlan, uri: str) -> list[str]:
    """Shards of held-out rows; files are encoded into `uri` first. Empty without evaluation."""
    if not config.evaluation or plan.evaluation_shards is not None:
        return plan.evaluation_shards or []
    encoder = make_encoder(config.model, data_options(config), config.trust_remote_code)
    refused: list[Refused] = []
    records = [
        {"input_ids": row.input_ids, "response_mask": row.response_mask}
        for _, row in good_rows(plan_units(config.evaluation), encoder.encode, refused, config.columns)
    ]
    if not records:
        raise UserError(f"--evaluation: no row can be used: {reasons(refused) or 'the files are empty'}")
    report_refused("held-out", len(records), refused)
    fields = [schema.ENCODED.field(name) for name in ("input_ids", "response_mask")]
    storage.write_table(pa.Table.from_pylist(records, schema=pa.schema(fields)), uri)
    return [uri]


def check_resources(config: TrainConfig, there: dict[str, float]) -> None:
    """On a machine of its own, workers that do not fit would wait for ever; a cluster may grow."""
    if os.environ.get("RAY_ADDRESS"):
        return
    for kind, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        wanted = each * config.num_workers
        available = there.get(kind, 0)
        if wanted > available:
            raise UserError(
                f"--num-workers {config.num_workers} needs {wanted:g} {kind}s, Ray has {available:g} here; use fewer "
                f"workers or set --{kind.lower()}s-per-worker"
            )
