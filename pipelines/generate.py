"""Prompts in, responses out: the RESPONSES folder, by engine replicas (pipelines/engines.py).

    files -> read_prompts (CPU tasks) -> requests per sample -> engine replicas -> write_responses -> commit records

A block is a run of prompts with all their samples and becomes one shard, so a prompt's samples are never apart; a run
that was cut off starts again with the prompts that no record names. A sample's seed comes from (seed, prompt, sample).
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from alphatoken import manifest as manifests
from alphatoken import schema, storage
from alphatoken.chat import ChatRenderer
from alphatoken.checkpoint_files import settings_fingerprint
from alphatoken.config import DataOptions
from alphatoken.encode import Encoder
from alphatoken.errors import BadRowError, UserError
from alphatoken.generate_config import GenerateConfig, SamplingOptions
from alphatoken.model import fingerprint, load_model, planned_dtype
from alphatoken.prompts import PromptReader, check_prompt_source, check_room_for_prompt
from alphatoken.readers import ROWS_PER_FILE
from alphatoken.run_folder import RunFolder, row_id_runs
from alphatoken.sources import ReadUnit, SourceRow, check_outside, data_fingerprint, first_row, plan_units, read_unit
from alphatoken.tokenizer import load_config, load_tokenizer
from pipelines import metrics
from pipelines.cluster import connect, prepare_worker, torch_threads, user_errors
from pipelines.encode import row_name, unfinished
from pipelines.engines import REQUESTS, EnginePlan, answered, choose_engine, engine_room, make_plan, sample_seed
from pipelines.shards import total_counts

logger = logging.getLogger(__name__)

LARGEST_ROW_ID = 10**15  # shard names have 15 digits
PROMPTS_PER_TABLE = 64
# Settings that change where and how fast, but not what is written.
NOT_IDENTITY = {
    "output", "overwrite", "replicas", "gpus_per_replica", "cpus_per_replica", "tensor_parallel", "cpu_cache_gb",
    "batch_tokens", "shard_rows",
}  # fmt: skip

Progress = Callable[[dict], None]  # called with running counts after every shard


@dataclass(frozen=True)
class PromptPlan:
    """Everything that a task needs to read prompts; small, sent to every task."""

    config: GenerateConfig
    chat_template: str | None  # its text
    context: int
    finished: tuple[tuple[int, int], ...] = ()  # runs of row ids that an earlier attempt has committed

    def reader(self) -> PromptReader:
        config = self.config
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        vocab_size = load_config(config.model, config.trust_remote_code).get_text_config().vocab_size
        options = DataOptions(columns=config.columns, max_length=self.context)
        return PromptReader(Encoder(tokenizer, options, vocab_size), self.context - config.max_new_tokens, config.chat)


def run_generate(config: GenerateConfig, progress: Progress | None = None) -> dict:
    """Write the RESPONSES folder `config.output` and return its manifest. Resumes a run that was cut off.

    Raises UserError for anything that can be known to be wrong before an engine starts.
    """
    started = time.monotonic()
    units = plan_units(config.prompts)
    plan = check_generate(config, units)
    engine = choose_engine(config)
    folder = RunFolder(storage.absolute(config.output))
    connect(engine_room(config))
    with user_errors():
        model = ray.get(model_fingerprint.remote(config.model, config.trust_remote_code))
        fingerprints = {"model": model, **input_fingerprints(config, units)}
        if folder.open(generate_identity(plan, engine, fingerprints), config.overwrite) == "finished":
            logger.info("%s is already finished", folder.uri)
            return folder.manifest()
        _generate_units(units, plan, folder, model, progress)
    counts = total_counts(folder, "no response could be generated")
    workers = metrics.time_per_worker(folder.commits())
    manifest = manifests.build_manifest(
        "generate", config.model_dump(mode="json"), counts, fingerprints, time.monotonic() - started,
        extra={"engine": engine, "context": plan.context, "chat_template": plan.chat_template, "workers": workers},
    )  # fmt: skip
    folder.finish(manifest, manifests.data_card("generate", manifest, schema.RESPONSES))
    return manifest


def input_fingerprints(config: GenerateConfig, units: list[ReadUnit]) -> dict:
    """Of everything but the weights."""
    return {
        "model_settings": settings_fingerprint(config.model, config.trust_remote_code),
        "data": data_fingerprint(units),
    }


def generate_identity(plan: PromptPlan, engine: str, fingerprints: dict) -> dict:
    """What the output folder keeps of the run, to know it again."""
    settings = plan.config.model_dump(mode="json", exclude=NOT_IDENTITY) | {
        "engine": engine, "chat_template": plan.chat_template, "context": plan.context,
        "dtype": planned_dtype(plan.config.dtype, plan.config.gpus_per_replica),
    }  # fmt: skip
    return {"stage": "generate", "config": settings, "fingerprints": fingerprints}


def check_generate(config: GenerateConfig, units: list[ReadUnit]) -> PromptPlan:
    """Everything that is known without the weights. Raises UserError."""
    check_prompt_source(units, config.columns)
    check_outside(config.output, config.prompts)
    files = units[-1].file_index + 1
    if files * ROWS_PER_FILE * config.samples > LARGEST_ROW_ID:
        raise UserError(f"{files} files with {config.samples} samples per prompt have too many rows: join the files")
    template = None
    if config.chat_template is not None:
        try:
            template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template {config.chat_template}: cannot be read ({error})") from error
    positions = getattr(
        load_config(config.model, config.trust_remote_code).get_text_config(), "max_position_embeddings", None
    )
    context = min(filter(None, (config.max_length, positions)), default=None)
    if context is None:
        raise UserError(f"how much {config.model} can hold is not in its configuration: give --max-length")
    check_room_for_prompt(config.max_new_tokens, context)
    plan = PromptPlan(config, template, context)
    reader = plan.reader()
    if template is not None or config.chat:
        ChatRenderer(reader.encoder.tokenizer)
    with suppress(BadRowError):  # only for what is wrong with more than the row: a tokenizer without a chat template
        reader.read(first_row(units[0]))
    return plan


@ray.remote
def model_fingerprint(model: str, trust_remote_code: bool) -> str:
    prepare_worker(torch_threads())
    return fingerprint(load_model(model, "stored", torch.device("cpu"), trust_remote_code).model)


def _generate_units(
    units: list[ReadUnit], plan: PromptPlan, folder: RunFolder, model: str, progress: Progress | None
) -> None:
    config = plan.config
    finished = tuple((first, last) for first, last in folder.finished_row_ids())
    if finished:
        logger.info("resuming: %d prompts were already answered", sum(last - first + 1 for first, last in finished))
    plan = PromptPlan(config, plan.chat_template, plan.context, finished)
    prompts = ray.data.from_items([{"unit": index} for index in range(len(units))], override_num_blocks=len(units))
    requests = (
        prompts.map_batches(
            read_prompts, batch_size=1, batch_format="numpy", fn_kwargs={"units": units, "plan": plan}, num_cpus=0.5
        )
        # Whole prompts per block, and blocks whole from here on.
        .repartition(target_num_rows_per_block=max(1, config.shard_rows // config.samples), strict=True)
        .map_batches(
            one_per_sample, batch_size=None, batch_format="pyarrow", num_cpus=0.5,
            fn_kwargs={"samples": config.samples, "seed": config.seed},
        )
    )  # fmt: skip
    written = answered(requests, engine_plan(config, plan.context), folder.uri).map_batches(
        write_responses, batch_size=None, batch_format="pyarrow", num_cpus=0.5,
        fn_kwargs={"output": folder.uri, "samples": config.samples, "model": model},
    )  # fmt: skip
    total: Counter = Counter()
    for record in folder.commits():
        total.update(record["counts"])
    for row in written.iter_rows():
        total.update({name: value for name, value in row.items() if isinstance(value, int | float)})
        if progress:
            progress(dict(total))


def engine_plan(config: GenerateConfig, context: int) -> EnginePlan:
    sampling = SamplingOptions(**config.model_dump(include=set(SamplingOptions.model_fields)))
    return make_plan(config.model, config.dtype, config, context, sampling)


def read_prompts(batch: dict[str, np.ndarray], units: list[ReadUnit], plan: PromptPlan) -> Iterator[pa.Table]:
    """The Ray Data stage: REQUESTS, one per prompt and still without its seed."""
    reader = plan.reader()
    for index in batch["unit"]:
        rows = unfinished(read_unit(units[int(index)]), plan.finished)
        records: list[dict] = []
        for row in rows:
            if plan.config.limit is not None and row.position >= plan.config.limit:
                break
            records.append(prompt_request(row, reader, plan.config.columns.get("id", "id")))
            if len(records) == PROMPTS_PER_TABLE:
                yield pa.Table.from_pylist(records, schema=REQUESTS)
                records = []
        if records:
            yield pa.Table.from_pylist(records, schema=REQUESTS)


def prompt_request(row: SourceRow, reader: PromptReader, id_column: str = "id") -> dict[str, Any]:
    """One of REQUESTS, still without its seed; with the reason where the row has no prompt that can be used."""
    carried: dict[str, Any] = {"id": row_name(row, id_column), "source": row.source, "position": row.position}
    reason, ids = row.error or "", []
    if row.data is not None:
        try:
            found = reader.read(row.data)
            carried |= {"prompt": found.prompt, "messages": found.messages, "answer": found.answer}
            ids = found.prompt_ids
        except BadRowError as error:
            reason = str(error)
    return {"row_id": row.row_id, "carried": json.dumps(carried), "prompt_ids": ids, "seed": 0, "reason": reason}


def one_per_sample(prompts: pa.Table, samples: int, seed: int) -> pa.Table:
    """REQUESTS per sample; a prompt that cannot be used stays one row."""
    rows = []
    for row in prompts.to_pylist():
        for sample in range(1 if row["reason"] else samples):
            rows.append(
                row | {"row_id": row["row_id"] * samples + sample, "seed": sample_seed(seed, row["row_id"], sample)}
            )
    return pa.Table.from_pylist(rows, schema=REQUESTS)


def _check_whole(rows: list[dict], samples: int) -> None:
    """A torn block is a bug: its pieces would count prompts twice and write over each other's shard."""
    # A prompt that cannot be used, and so has no tokens, is one row.
    expected = {row["row_id"] // samples: samples if row["prompt_ids"] or not row["reason"] else 1 for row in rows}
    found = Counter(row["row_id"] // samples for row in rows)
    for prompt, number in found.items():
        if number != expected[prompt]:
            raise RuntimeError(
                f"internal error: a block has {number} of the {expected[prompt]} responses to prompt {prompt}, so "
                "blocks were split; nothing of it was written, please report this"
            )


def write_responses(block: pa.Table, output: str, samples: int, model: str, stage: str = "generate") -> dict[str, list]:
    """Write one shard and its commit record; returns its counts as one row."""
    if not block.num_rows:
        return {}
    rows = sorted(block.to_pylist(), key=lambda row: row["row_id"])
    _check_whole(rows, samples)
    responses, refused = [], []
    for row in rows:
        carried = json.loads(row["carried"])
        if row["reason"]:
            refusing = "generate" if row["prompt_ids"] else "prompt"
            place = {name: carried[name] for name in ("id", "source", "position")}
            refused.append(place | {"row_id": row["row_id"], "stage": refusing, "reason": row["reason"]})
        else:
            responses.append(
                row
                | {name: carried[name] for name in ("id", "prompt", "messages", "answer")}
                | {"sample": row["row_id"] % samples, "model_fingerprint": model}
            )
    prompts = np.unique([row["row_id"] // samples for row in rows])
    counts = {
        "prompts": len(prompts),
        "rows_in": len(rows),
        "rows_out": len(responses),
        "rows_quarantined": len(refused),
        "responses_cut": sum(row["finish_reason"] == "length" for row in responses),
        "prompt_tokens": sum(len(row["prompt_ids"]) for row in responses),
        "response_tokens": sum(len(row["token_ids"]) for row in responses),
    }
    record = {
        "first_row_id": int(prompts[0]),
        "row_ids": row_id_runs(prompts),
        "counts": counts,
        "reasons": dict(Counter(row["reason"] for row in refused)),
        "worker": next((row["worker"] for row in rows if row["worker"]), "none"),  # a shard is answered by one replica
        "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 4),
    }
    data = pa.Table.from_pylist(responses, schema=schema.RESPONSES)
    RunFolder(output).write_shard(data, pa.Table.from_pylist(refused, schema=schema.QUARANTINE), record)
    metrics.count_shard(stage, record)
    return {name: [value] for name, value in counts.items()}
