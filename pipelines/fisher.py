"""The diagonal Fisher of a reference model, from responses that it samples itself.

    prompts ──> engine replicas, as in generate (pipelines/engines.py) ──> samples ──> gradients squared ──> file

Samples are kept in shards beside the file until it is there, and sums of gradients too (pipelines/kept_sum.py).
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from transformers import AutoModelForCausalLM

from alphatoken import storage, tensor_file
from alphatoken.architecture import scored_linears
from alphatoken.batching import Batch, plan_batches
from alphatoken.checkpoint_files import settings_fingerprint
from alphatoken.config import DataOptions
from alphatoken.direction import GradientSum
from alphatoken.errors import UserError
from alphatoken.fisher import fisher_sum, mean_of, sampled_batch
from alphatoken.fisher_config import FisherConfig
from alphatoken.generate_config import SamplingOptions
from alphatoken.model import load_model, planned_dtype
from alphatoken.model_encoder import make_encoder
from alphatoken.prompts import PromptReader, check_prompt_source, check_room_for_prompt
from alphatoken.run_folder import RunFolder
from alphatoken.sources import check_outside, data_fingerprint, plan_units, read_unit
from alphatoken.tokenizer import load_config
from pipelines import metrics
from pipelines.cluster import MANY_DEATHS, connect, prepare_worker, torch_threads, user_errors
from pipelines.direction import one_accelerator
from pipelines.engines import REQUESTS, EnginePlan, answered, choose_engine, engine_room, make_plan, sample_seed
from pipelines.generate import model_fingerprint, prompt_request, write_responses
from pipelines.kept_sum import Block, KeptSums, open_parts
from pipelines.progress import Phase, Tally, counted, following, tick_of
from pipelines.refused import Refused, died, reasons, report_refused, write_refused

logger = logging.getLogger(__name__)

ANY_LENGTH = 10**9  # prompts are cut, not refused
PROMPTS_PER_BLOCK = 64  # replicas take blocks; each becomes a shard of samples
SAMPLES, GRADIENTS = "samples", "gradients"  # what is counted


def run_fisher(config: FisherConfig, progress: Phase | None = None) -> dict:
    """Sample, accumulate and save; returns the provenance as a dictionary, with `already_finished` where nothing was
    left to do. Goes on with a run that was cut off.

    Raises UserError before an engine starts.
    """
    plan = check_fisher(config)
    config = config.model_copy(update={"output": storage.absolute(config.output)})
    connect(engine_room(config))
    with user_errors():
        model = ray.get(model_fingerprint.remote(config.model, config.trust_remote_code))
        run = fisher_run(config, model, planned_dtype(config.dtype, one_accelerator().get("num_gpus", 0)))
        if there := tensor_file.finished(config.output, "fisher", run, config.overwrite):
            logger.info("%s is already finished", config.output)
            return asdict(there) | {"already_finished": True}
        folder = open_parts(config.output, {"stage": "fisher", **run}, config.overwrite)
        counter = Tally.remote() if progress else None
        with following(counter, progress):
            requests = ray.get(read_prompts.remote(config, plan.context - config.max_new_tokens))
            _sample(requests, plan, folder, run["model_fingerprint"], counter)
            make = make_fisher.options(**one_accelerator(), max_retries=MANY_DEATHS)
            return ray.get(make.remote(config, run, folder.uri, torch_threads(), counter))


def fisher_run(config: FisherConfig, model: Any, dtype: Any) -> dict[str, Any]:
    """What makes this Fisher and no other: fields of Provenance. model: its fingerprint; dtype: its name."""
    names = ("num_prompts", "max_prompt_tokens", "max_new_tokens", "seed", "columns", "engine_options")
    options = {name: getattr(config, name) for name in names} | {"engine": choose_engine(config), "dtype": dtype}
    options["model_settings"] = settings_fingerprint(config.model, config.trust_remote_code)
    return {
        "model_fingerprint": model,
        "parameters": config.parameters,
        "data_fingerprint": data_fingerprint(config.prompts),
        "options": options,
    }


def _sample(requests: pa.Table, plan: EnginePlan, folder: RunFolder, model: str, counter: Any) -> None:
    """Responses to the requests that have none yet, in shards of `folder`."""
    done = np.array([row_id for first, last in folder.finished_row_ids() for row_id in range(first, last + 1)])
    todo = requests.filter(pa.array(~np.isin(requests["row_id"].to_numpy(), done)))
    tick_of(counter)(SAMPLES, requests.num_rows - todo.num_rows)
    if not todo.num_rows:
        return
    parts = [todo.slice(start, PROMPTS_PER_BLOCK) for start in range(0, todo.num_rows, PROMPTS_PER_BLOCK)]
    written = answered(ray.data.from_arrow(parts), plan, folder.uri).map_batches(
        write_samples, batch_size=None, batch_format="pyarrow", num_cpus=0.5,
        fn_kwargs={"output": folder.uri, "model": model, "counter": counter},
    )  # fmt: skip
    for _ in written.iter_rows():
        pass


def write_samples(block: pa.Table, output: str, model: str, counter: Any) -> dict[str, list]:
    """One shard, as `generate` writes them."""
    counts = write_responses(block, output, samples=1, model=model, stage=SAMPLES)
    tick_of(counter)(SAMPLES, block.num_rows)
    return counts


def check_fisher(config: FisherConfig) -> EnginePlan:
    """Everything that is known without the weights. Raises UserError."""
    if config.parameters in ("all", "lora"):
        raise UserError(
            "the Fisher (Eq. 5) is defined for linear weights: use --parameters last-layers:K or all-linear"
        )
    check_prompt_source(plan_units(config.prompts), config.columns)
    check_outside(config.output, config.prompts)
    model_config = load_config(config.model, config.trust_remote_code)
    with torch.device("meta"):  # an unknown layout must not cost the sampling first
        layout = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    scored_linears(layout, config.parameters)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or ANY_LENGTH
    check_room_for_prompt(config.max_new_tokens, positions)
    context = min(config.max_prompt_tokens + config.max_new_tokens, positions)
    choose_engine(config)
    sampling = SamplingOptions(temperature=1.0, top_p=1.0, max_new_tokens=config.max_new_tokens, seed=config.seed)
    return make_plan(config.model, config.dtype, config, context, sampling)


@ray.remote
def read_prompts(config: FisherConfig, longest: int) -> pa.Table:
    """REQUESTS of the first usable prompts, cut at their start, and of those between that are not usable."""
    options = DataOptions(columns=config.columns, max_length=ANY_LENGTH)
    reader = PromptReader(make_encoder(config.model, options, config.trust_remote_code), ANY_LENGTH)
    requests: list[dict[str, Any]] = []
    usable = 0
    for row in (row for unit in plan_units(config.prompts) for row in read_unit(unit)):
        found = prompt_request(row, reader, config.columns.get("id", "id"))
        seed = sample_seed(config.seed, row.row_id, 0)
        requests.append(found | {"prompt_ids": found["prompt_ids"][-longest:], "seed": seed})
        usable += not found["reason"]
        if usable == config.num_prompts:
            break
    return pa.Table.from_pylist(requests, schema=REQUESTS)


@ray.remote
def make_fisher(config: FisherConfig, run: dict[str, Any], samples: str, threads: int, counter: Any = None) -> dict:
    """From the folder of samples to the file, on the machine that holds the model."""
    started = time.monotonic()
    prepare_worker(threads)
    scoring = load_model(config.model, config.dtype, trust_remote_code=config.trust_remote_code)
    tick = tick_of(counter)

    def add(rows: list[dict], so_far: GradientSum) -> GradientSum:
        groups = plan_batches([_length(row) for row in rows], config.batch_tokens)
        pairs = [(row["prompt_ids"], row["token_ids"]) for row in rows]
        batches: Iterable[Batch] = (sampled_batch([pairs[i] for i in group]).to(scoring.device) for group in groups)
        batches = counted(batches, tick, GRADIENTS, lambda batch: batch.input_ids.shape[0])
        return fisher_sum(scoring, batches, config.parameters, so_far)

    sums = KeptSums(RunFolder(samples), config.batch_tokens, scoring.device)
    total, deadly = sums.over(0, sample_blocks(samples), add, _length, tick, GRADIENTS)
    refused = _quarantined(samples) + died(plan_units(config.prompts), deadly)
    try:
        found = mean_of(total)
    except UserError as error:
        raise UserError(f"{error} {reasons(refused)}".strip()) from error
    report_refused("prompt", found.num_rows, refused)
    provenance = tensor_file.Provenance(
        kind="fisher",
        num_rows=found.num_rows,
        num_tokens=found.num_tokens,
        **run | {"options": run["options"] | {"num_refused": len(refused)}},
    )
    tensors = {f"fisher/{name}": tensor.cpu() for name, tensor in found.tensors.items()}
    write_refused(config.output, "fisher", refused)
    tensor_file.save(config.output, tensor_file.TensorFile(provenance, tensors))
    storage.remove_tree(samples)
    metrics.count_file("fisher", asdict(provenance), time.monotonic() - started)
    return asdict(provenance)


def sample_blocks(folder: str) -> Iterator[Block]:
    """The samples of each shard, in order."""
    for name in sorted(storage.list_names(storage.join(folder, "data"))):
        table = storage.read_table(storage.join(folder, "data", name), ["row_id", "prompt_ids", "token_ids"])
        yield [(row["row_id"], row) for row in table.sort_by("row_id").to_pylist()]


def _length(sample: dict) -> int:
    return len(sample["prompt_ids"]) + len(sample["token_ids"])


def _quarantined(folder: str) -> list[Refused]:
    uris = [storage.join(folder, "quarantine", name) for name in storage.list_names(storage.join(folder, "quarantine"))]
    rows = [row for uri in sorted(uris) for row in storage.read_table(uri).to_pylist()]
    return [Refused(**{name: row[name] for name in Refused.__dataclass_fields__}) for row in rows]
