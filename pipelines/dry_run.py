"""What a run would do, after every check that can be done before a model is loaded: `--dry-run` of all heavy commands.

Each stage's own checks run here as they do in the stage, so they raise the same UserErrors. Then the output folder is
looked at, and the rows are counted where that is cheap. Nothing is written, and Ray is not started.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from alphatoken import storage, tensor_file
from alphatoken.adapters import base_of
from alphatoken.config import DataOptions, DirectionConfig, ScoreConfig, StageConfig
from alphatoken.errors import UserError
from alphatoken.fisher_config import FisherConfig
from alphatoken.generate_config import GenerateConfig, PairConfig
from alphatoken.model_encoder import make_encoder
from alphatoken.pair_encode import is_pair_data
from alphatoken.plan_data import Sequences, Survey, sequence_encoder, survey_rows
from alphatoken.prompts import PromptReader
from alphatoken.rounds_config import RoundsConfig
from alphatoken.run_folder import UNKNOWN, RunFolder, manifest_of
from alphatoken.schedule import Schedule
from alphatoken.sources import ReadUnit, file_bytes, plan_units
from alphatoken.targets import validation_files
from alphatoken.tokenizer import load_config
from alphatoken.train_config import TrainConfig
from pipelines.cluster import LOCAL_CPUS
from pipelines.direction import check_direction_inputs
from pipelines.direction_identity import direction_run
from pipelines.engines import choose_engine
from pipelines.fisher import ANY_LENGTH, check_fisher, fisher_run
from pipelines.generate import check_generate, generate_identity
from pipelines.generate import input_fingerprints as generate_fingerprints
from pipelines.live_values import data_options, longest_prompt
from pipelines.pair import check_pair
from pipelines.rounds import check_room, make_schedule
from pipelines.score import check_inputs, input_fingerprints, score_identity
from pipelines.train import Training, check_resume, train_identity
from pipelines.train_checks import TrainPlan, check_resources, check_train

SAMPLE_ROWS = 2_000  # are encoded; all are counted
CHEAP_BYTES, CHEAP_UNITS = 64 * 2**20, 50  # of input: larger ones are not read, `alphatoken plan` is for them
REASONS = 3
MODELS = ("model", "reference_model", "judge_model")

Facts = dict[str, Any]
Found = tuple[Facts, dict | None]  # what would be done; what the output folder keeps of the run, None for a file


def dry_run(config: StageConfig) -> dict:
    """JSON values: `output`, its `state` (new, replace, resume or finished), and what the stage knows of its input.

    Raises UserError as the run itself would.
    """
    facts, identity = CHECKS[type(config)](config)
    for name in MODELS:
        if model := getattr(config, name, None):
            load_config(base_of(model), getattr(config, "trust_remote_code", False))
    _check_writable(config.output)
    state = _file_state(config) if identity is None else _folder_state(config, identity)
    return {"dry_run": True, "output": config.output, "state": state} | facts


# the output


def _folder_state(config: StageConfig, identity: dict) -> str:
    folder = RunFolder(storage.absolute(config.output))
    state: str = folder.look(identity, config.overwrite)
    if isinstance(config, TrainConfig):
        check_resume(config, folder, state)
    return "replace" if state == "new" and storage.list_names(folder.uri) else state


def _file_state(config: StageConfig) -> str:
    if not storage.exists(config.output):
        return "new"
    if isinstance(config, DirectionConfig):
        run = direction_run(config, config.parameters, config.positions or "all", UNKNOWN, UNKNOWN)
        there = tensor_file.finished(config.output, "direction", run, config.overwrite)
    else:
        assert isinstance(config, FisherConfig)
        there = tensor_file.finished(config.output, "fisher", fisher_run(config, UNKNOWN, UNKNOWN), config.overwrite)
    return "finished" if there else "replace"


def _check_writable(path: str) -> None:
    """Of a local path: the nearest folder that is there must take files."""
    if not storage.is_local(path):
        return
    folder = storage.absolute(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {path}: {folder} is not writable; give another place")


# rows


def _survey(units: list[ReadUnit], encode: Callable[[dict], Sequences]) -> Survey | None:
    """The rows counted, a sample of them encoded; None where reading them takes long."""
    if file_bytes(units, "jsonl", "parquet") > CHEAP_BYTES or len(units) > CHEAP_UNITS:
        return None
    return survey_rows(units, encode, SAMPLE_ROWS)


def _facts(found: Survey | None, rows: str = "rows") -> Facts:
    """`rows` is what they are called."""
    if found is None:
        return {rows: "too many to count here; `alphatoken plan` counts them"}
    facts: Facts = {rows: found.rows, "tokens": round(sum(found.lengths) * found.scale)}
    facts["response_tokens"] = round(sum(found.responses) * found.scale)
    facts[f"unusable_{rows}"] = round(found.unusable_rows * found.scale)
    facts[f"truncated_{rows}"] = round(found.truncated * found.scale)
    reasons = [f"{round(count * found.scale)} x {reason}" for reason, count in list(found.unusable.items())[:REASONS]]
    facts["reasons"] = reasons or None
    if found.sampled < found.rows:
        facts["estimated"] = f"from {found.sampled} rows"
    return {name: value for name, value in facts.items() if value}


def _usable(found: Survey | None) -> int | None:
    return None if found is None else found.rows - round(found.unusable_rows * found.scale)


def _validation(config: ScoreConfig | DirectionConfig) -> Survey | None:
    pairs = config.validation_objective == "dpo"
    encode = sequence_encoder(config.model, config, config.trust_remote_code, pairs)
    return _survey(plan_units(validation_files(config.validation)), encode)


def _prompts(reader: PromptReader) -> Callable[[dict], Sequences]:
    def encode(row: dict) -> Sequences:
        return Sequences([len(reader.read(row).prompt_ids)], [0], [0], False)

    return encode


# stages


def _score(config: ScoreConfig) -> Found:
    units = plan_units(config.data)
    pairs = is_pair_data(config.objective, units, config.columns)
    parameters = check_inputs(config, units, pairs)
    facts: Facts = {"data": "preference pairs" if pairs else "rows"}
    facts |= _facts(_survey(units, sequence_encoder(config.model, config, config.trust_remote_code, pairs)))
    if config.validation:
        facts["validation_rows"] = _usable(_validation(config))
    facts |= {"estimator": config.estimator, "parameters": parameters, "actors": config.num_actors}
    fingerprints = {"model": UNKNOWN} | input_fingerprints(config)
    if pairs:
        fingerprints["reference_model"] = UNKNOWN
    return facts, score_identity(config, parameters, fingerprints)


def _direction(config: DirectionConfig) -> Found:
    check_direction_inputs(config)
    return _facts(_validation(config)) | {"parameters": config.parameters}, None


def _fisher(config: FisherConfig) -> Found:
    plan = check_fisher(config)
    options = DataOptions(columns=config.columns, max_length=ANY_LENGTH)
    reader = PromptReader(make_encoder(config.model, options, config.trust_remote_code), ANY_LENGTH)
    found = _survey(plan_units(config.prompts), _prompts(reader))
    facts = _facts(found, "prompts")
    usable = _usable(found)
    facts["used_prompts"] = config.num_prompts if usable is None else min(usable, config.num_prompts)
    longest = plan.context - config.max_new_tokens
    facts |= {"longest_prompt": longest, "longest_response": config.max_new_tokens, "engine": choose_engine(config)}
    return facts | {"parameters": config.parameters}, None


def _generate(config: GenerateConfig) -> Found:
    units = plan_units(config.prompts)
    plan, engine = check_generate(config, units), choose_engine(config)
    found = _survey(units, _prompts(plan.reader()))
    facts, usable = _facts(found, "prompts"), _usable(found)
    if config.limit is not None:
        most = config.limit * (units[-1].file_index + 1)
        facts["used_prompts"] = usable = most if usable is None else min(usable, most)
    facts["responses"] = None if usable is None else usable * config.samples
    facts |= {"longest_response": config.max_new_tokens, "context": plan.context, "engine": engine}
    return facts, generate_identity(plan, engine, {"model": UNKNOWN} | generate_fingerprints(config, units))


def _pair(config: PairConfig) -> Found:
    generated, identity = check_pair(config)
    counts = generated["counts"]
    facts = {"prompts": counts["prompts"], "responses": counts["rows_out"], "judge": config.judge}
    return facts | {"most_pairs": counts["prompts"] * config.max_pairs}, identity


def _train(config: TrainConfig) -> Found:
    plan = check_train(config, load_models=False)
    cpus = max(os.cpu_count() or 1, LOCAL_CPUS)
    in_rounds = isinstance(config, RoundsConfig)  # whose private Ray is made as large as it needs
    if isinstance(config, RoundsConfig):
        check_room(config)
    check_resources(config, {"CPU": float("inf") if in_rounds else cpus, "GPU": torch.cuda.device_count()})
    if config.trains_on_files:
        facts, rows = _training_files(config)
    else:
        counts = manifest_of(storage.absolute(config.folder), "mask", "--data").get("counts", {})
        facts, rows = {"rows": plan.num_rows, "kept_fraction": counts.get("kept_fraction")}, plan.num_rows
    facts |= {"objective": config.objective, "batch_rows": config.batch_rows, "workers": config.num_workers}
    if config.max_steps or rows:
        facts |= _steps(config, replace(plan, num_rows=rows or 1))
    return facts, train_identity(config, plan)


def _training_files(config: TrainConfig) -> tuple[Facts, int | None]:
    """(facts, usable rows) of files that would be encoded."""
    options = data_options(config)
    if config.data_kind == "prompts":
        encoder = make_encoder(config.model, options, config.trust_remote_code)
        encode = _prompts(PromptReader(encoder, longest_prompt(config)))
    else:
        encode = sequence_encoder(config.model, options, config.trust_remote_code, config.data_kind == "pairs")
    found = _survey(plan_units(config.data), encode)
    return _facts(found), _usable(found)


def _steps(config: TrainConfig, plan: TrainPlan) -> Facts:
    if isinstance(config, RoundsConfig):
        schedule = make_schedule(Training(config, plan, "", [], 0.0))
        return {"steps": schedule.total_steps, "windows": len(schedule.windows), "rule": config.rule}
    schedule = Schedule(
        num_rows=plan.num_rows,
        rows_per_forward=config.per_device_batch_size * config.num_workers,
        accumulation=config.gradient_accumulation,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        plain_steps=0,
        refresh_every=config.refresh_every,
    )
    return {"steps": schedule.total_steps}


CHECKS: dict[type, Callable[[Any], Found]] = {
    ScoreConfig: _score,
    DirectionConfig: _direction,
    FisherConfig: _fisher,
    GenerateConfig: _generate,
    PairConfig: _pair,
    TrainConfig: _train,
    RoundsConfig: _train,
}
