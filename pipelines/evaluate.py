"""Models and files in, one table of measures out: a Ray task for every model and file, on a GPU where there is one.

The driver compares: with two models, row by row (alphatoken/evaluation.py).
"""

import logging
import math
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

import ray

from alphatoken import manifest as manifests
from alphatoken import storage
from alphatoken.encode import Encoder
from alphatoken.errors import BadRowError, UserError, first_line
from alphatoken.evaluate_config import EvaluateConfig
from alphatoken.evaluation import Estimate, RowSums, answer_accuracy, choice_accuracy, estimate, token_loss
from alphatoken.evaluation_rows import KNOWN_COLUMNS, RowReader, check_columns
from alphatoken.model import fingerprint, load_model
from alphatoken.prompts import check_room_for_prompt
from alphatoken.sources import ReadUnit, SourceRow, data_fingerprint, first_row, plan_units, read_unit
from alphatoken.tokenizer import load_config, load_tokenizer
from pipelines.cluster import connect, prepare_worker, torch_threads, user_errors
from pipelines.progress import Phase, Tally, following, tick_of
from pipelines.refused import MAX_REASONS, report_refused
from pipelines.suites import as_number, check_installed, run_suites, suite_measures

logger = logging.getLogger(__name__)

CPU_TASKS_PER_NODE = 2  # every task holds a model: more would not be faster on the same cores


@dataclass(frozen=True)
class FileResult:
    """What one model did on one file."""

    measures: dict[str, RowSums]
    counts: dict[str, Any]
    fingerprint: str  # of the model


def run_evaluate(config: EvaluateConfig, progress: Phase | None = None) -> dict:
    """Evaluate, write `config.output` if that is set, and return the same as JSON values.

    `measures` has one entry per file and measure, `values` in the order of the models. Raises UserError for anything
    that can be known to be wrong before a model is loaded.
    """
    started = time.monotonic()
    plans = _check_inputs(config)
    connect()
    with user_errors():
        files, suites = _run_all(config, plans, progress)
    measures = [entry for kind, name, _ in config.files for entry in _file_measures(config, files, kind, name)]
    measures += suite_measures(config.model, suites)
    result = manifests.build_manifest(
        "evaluate",
        config.model_dump(mode="json"),
        {"models": len(config.model), "files": len(config.files), "measures": len(measures)},
        {
            "models": {model: result.fingerprint for (model, _, _), result in files.items()},
            "files": {f"{kind} {name}": data_fingerprint(units) for (kind, name), units in plans.items()},
        },
        time.monotonic() - started,
        extra={
            "measures": measures,
            "files": [
                {"model": model, "kind": kind, "file": name, **result.counts}
                for (model, kind, name), result in files.items()
            ],
        },
    )
    if config.output:
        storage.write_json(result, config.output)
    return result


# before a model is loaded


def _check_inputs(config: EvaluateConfig) -> dict[tuple[str, str], list[ReadUnit]]:
    """Everything that is known without the weights. Returns the reading plan of each (kind, name)."""
    if config.lm_eval:
        check_installed()
    unknown = sorted(set(config.columns) - KNOWN_COLUMNS)
    if unknown:
        known = ", ".join(sorted(KNOWN_COLUMNS))
        raise UserError(f"--columns {', '.join(unknown)}: no such column to fill; known are {known}.")
    readers = [make_reader(config, model) for model in config.model]
    plans: dict[tuple[str, str], list[ReadUnit]] = {}
    seen: set[str] = set()
    for kind, name, path in config.files:
        units = plans[kind, name] = plan_units([path])
        row = first_row(units[0])
        seen |= set(row)
        check_columns(kind, row, config.columns, path)
        for reader in readers:
            try:  # only for what is wrong with more than the row, such as a tokenizer without a chat template
                _convert(reader, kind, 0, row)
            except BadRowError:
                continue
    missing = sorted(set(config.columns.values()) - seen)
    if missing and config.files:
        found = ", ".join(sorted(seen))
        raise UserError(f"--columns names {', '.join(missing)}, which no file has: they have {found}.")
    if config.output:
        _check_output(config.output)
    return plans


def _check_output(output: str) -> None:
    """Writes a file beside it for a moment: where that fails, hours of evaluation would be lost."""
    fs, path = storage.filesystem(output)
    probe = f"{output}.{uuid.uuid4().hex}.tmp"
    try:
        if fs.isdir(path):
            raise UserError(f"--output {output} is a folder; give the name of a file")
        storage.write_bytes(b"", probe)
    except UserError:
        raise
    except Exception as error:  # drivers of object stores have errors of their own
        raise UserError(f"--output {output} cannot be written: {first_line(error)}; give another place") from error
    with suppress(Exception):  # who may write need not be allowed to delete
        storage.remove_file(probe)


def make_reader(config: EvaluateConfig, model: str) -> RowReader:
    """The reader for a model's tokenizer, within the positions that the model has."""
    model_config = load_config(model, config.trust_remote_code).get_text_config()
    positions = getattr(model_config, "max_position_embeddings", None) or math.inf
    if config.answers:
        check_room_for_prompt(config.max_new_tokens, positions)
    longest = int(min(config.max_length, positions))
    options = config.model_copy(update={"max_length": longest})
    encoder = Encoder(load_tokenizer(model, config.trust_remote_code), options, model_config.vocab_size)
    return RowReader(encoder, config.verifier, int(min(longest, positions - config.max_new_tokens)))


# the tasks


def _run_all(
    config: EvaluateConfig, plans: dict[tuple[str, str], list[ReadUnit]], progress: Phase | None
) -> tuple[dict[tuple[str, str, str], FileResult], dict[str, dict]]:
    """({(model, kind, name): result}, {model: lm-eval's results}), in the order of the configuration."""
    resources, threads = task_resources()
    counter = Tally.remote() if progress else None
    jobs: dict[Any, Any] = {}
    for (kind, name), units in plans.items():
        for model in config.model:
            reference = evaluate_file.options(**resources).remote(config, model, kind, name, units, threads, counter)
            jobs[reference] = (model, kind, name)
    if config.lm_eval:
        for model in config.model:
            jobs[run_suites.options(**resources).remote(config, model, threads)] = model
    waiting = list(jobs)
    found: dict[Any, Any] = {}
    try:
        with following(counter, progress):
            while waiting:
                ready, waiting = ray.wait(waiting)
                found |= {jobs[reference]: ray.get(reference) for reference in ready}
    except BaseException:
        for reference in waiting:  # a cluster goes on without its driver's interest
            ray.cancel(reference)
        raise
    ordered = {key: found[key] for key in jobs.values()}
    files = {key: value for key, value in ordered.items() if isinstance(key, tuple)}
    return files, {key: value for key, value in ordered.items() if isinstance(key, str)}


def task_resources() -> tuple[dict, int]:
    """What each task reserves, and its torch threads: a GPU, or a share of a node's CPUs."""
    if ray.cluster_resources().get("GPU"):
        return {"num_gpus": 1, "num_cpus": 1}, torch_threads()
    cpus = [int(node["Resources"]["CPU"]) for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    share = max(1, min(cpus) // CPU_TASKS_PER_NODE)
    return {"num_cpus": share}, torch_threads(CPU_TASKS_PER_NODE, share)


@ray.remote
def evaluate_file(
    config: EvaluateConfig, model: str, kind: str, name: str, units: list[ReadUnit], threads: int, counter: Any = None
) -> FileResult:
    """One model on one file."""
    prepare_worker(threads)
    scoring = load_model(model, config.dtype, trust_remote_code=config.trust_remote_code)
    reader = make_reader(config, model)
    used, tick = _Used(), partial(tick_of(counter), "rows")
    items = usable_items(reader, kind, units, config.limit, used)
    measures: dict[str, RowSums]
    counts: dict[str, Any] = {}
    if kind == "loss":
        measures = {"loss": token_loss(scoring, items, config.batch_tokens, tick)}
        counts["tokens"] = measures["loss"].count
    elif kind == "choices":
        plain, normalized = choice_accuracy(scoring, items, config.batch_tokens, tick)
        measures = {"accuracy": plain, "accuracy_normalized": normalized}
    else:
        solved, counts["answers_cut"] = answer_accuracy(
            scoring, reader.tokenizer, items, reader.extract,
            max_new_tokens=config.max_new_tokens, batch_tokens=config.batch_tokens, tick=tick,
        )  # fmt: skip
        measures = {"accuracy": solved}
    if not used.rows:
        raise UserError(f"--{kind} {name}: no row can be used; the first problem: {(used.refused or ['no rows'])[0]}")
    report_refused(f"{kind} {name} ({model})", used.rows, used.refused)
    counts |= {"rows": used.rows, "rows_truncated": used.truncated, "rows_refused": len(used.refused)}
    return FileResult(measures, counts | {"refused": used.refused[:MAX_REASONS]}, fingerprint(scoring.model))


@dataclass
class _Used:
    """Running counts of a file."""

    rows: int = 0
    truncated: int = 0
    refused: list[str] = field(default_factory=list)


def usable_items(reader: RowReader, kind: str, units: list[ReadUnit], limit: int | None, used: _Used) -> Iterator[Any]:
    """Pieces, questions or prompts of the first `limit` rows of each file; what is left out is counted in `used`."""
    for row in _first_rows_of_files(units, limit):
        try:
            if row.data is None:
                raise BadRowError(row.error)
            items = _convert(reader, kind, row.row_id, row.data)
        except BadRowError as error:
            used.refused.append(f"{row.source}, row {row.position}: {error}")
            continue
        used.rows += 1
        used.truncated += any(getattr(item, "truncated", False) for item in items)
        yield from items


def _first_rows_of_files(units: list[ReadUnit], limit: int | None) -> Iterator[SourceRow]:
    for _, parts in groupby(units, key=lambda unit: unit.file_index):
        yield from islice(chain.from_iterable(map(read_unit, parts)), limit)


def _convert(reader: RowReader, kind: str, row_id: int, row: dict) -> list[Any]:
    if kind == "loss":
        return reader.pieces(row_id, row)
    return [reader.question(row_id, row) if kind == "choices" else reader.prompt(row_id, row)]


# the table


def _file_measures(config: EvaluateConfig, files: dict, kind: str, name: str) -> Iterator[dict]:
    results = [files[model, kind, name] for model in config.model]
    if kind == "loss" and len({result.counts["tokens"] for result in results}) > 1:
        logger.warning("--loss %s: the models count different tokens in it, so their losses do not compare", name)
    for measure in results[0].measures:
        estimates = [estimate(result.measures[measure]) for result in results]
        yield _compared(kind, name, measure, estimates)
        if measure == "loss":
            yield _compared(kind, name, "perplexity", [each.exp() for each in estimates])


def _compared(kind: str, name: str, measure: str, estimates: list[Estimate]) -> dict:
    """One line of the table; with two models also second minus first."""
    values = [as_number(each.value, each.standard_error) for each in estimates]
    line: dict[str, Any] = {"kind": kind, "file": name, "measure": measure, "values": values}
    if len(estimates) == 2:
        change = estimates[1] - estimates[0]
        line["difference"] = as_number(change.value, change.standard_error)
    return line
