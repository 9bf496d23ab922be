"""The diagonal Fisher of a reference model, from responses that it samples itself.

    prompts ──> engine replicas, as in generate (pipelines/engines.py) ──> samples ──> gradients squared ──> file
"""

import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import torch
from transformers import AutoModelForCausalLM

from alphatoken import tensor_file
from alphatoken.architecture import scored_linears
from alphatoken.batching import Batch, plan_batches
from alphatoken.config import DataOptions
from alphatoken.errors import UserError
from alphatoken.fisher import diagonal_fisher, sampled_batch
from alphatoken.fisher_config import FisherConfig
from alphatoken.generate_config import SamplingOptions
from alphatoken.model import fingerprint, load_model
from alphatoken.prompts import PromptReader, check_prompt_source
from alphatoken.sources import data_fingerprint, plan_units
from alphatoken.tokenizer import load_config
from pipelines import metrics
from pipelines.cluster import connect, prepare_worker, torch_threads, user_errors
from pipelines.direction import one_accelerator, report_refused
from pipelines.encode import good_rows, make_encoder
from pipelines.engines import LOGICAL_CPUS, REQUESTS, EnginePlan, answered, choose_engine, make_plan, sample_seed
from pipelines.progress import Phase, Tally, counted, following, get_all, tick_of

ANY_LENGTH = 10**9  # prompts are cut, not refused
PROMPTS_PER_BLOCK = 64  # replicas take blocks


def run_fisher(config: FisherConfig, progress: Phase | None = None) -> dict:
    """Sample, accumulate and save; returns the provenance as a dictionary. UserError before an engine starts."""
    plan = check_fisher(config)
    connect(LOGICAL_CPUS)
    with user_errors():
        requests, refused = ray.get(read_prompts.remote(config, plan.context - config.max_new_tokens))
        parts = [requests.slice(start, PROMPTS_PER_BLOCK) for start in range(0, len(requests), PROMPTS_PER_BLOCK)]
        answers, counter = _sample(parts or [requests], plan, progress)
        make = make_fisher.options(**one_accelerator())
        return get_all([make.remote(config, answers, refused, torch_threads(), counter)], counter, progress)[0]


def _sample(parts: list[pa.Table], plan: EnginePlan, progress: Phase | None) -> tuple[list[ray.ObjectRef], Any]:
    """(blocks of ANSWERS, the counter of what is done)."""
    blocks = answered(ray.data.from_arrow(parts), plan)
    if not progress:
        return blocks.to_arrow_refs(), None
    counter = Tally.remote()
    blocks = blocks.map_batches(
        count_samples, batch_size=None, batch_format="pyarrow", fn_kwargs={"counter": counter}, num_cpus=0
    )
    with following(counter, progress):
        return blocks.to_arrow_refs(), counter


def count_samples(block: pa.Table, counter: Any) -> pa.Table:
    """The same block, counted."""
    tick_of(counter)("samples", block.num_rows)
    return block


def check_fisher(config: FisherConfig) -> EnginePlan:
    """Everything that is known without the weights. Raises UserError."""
    if config.parameters in ("all", "lora"):
        raise UserError(
            "the Fisher (Eq. 5) is defined for linear weights: use --parameters last-layers:K or all-linear"
        )
    check_prompt_source(plan_units(config.prompts), config.columns)
    model_config = load_config(config.model, config.trust_remote_code)
    with torch.device("meta"):  # an unknown layout must not cost the sampling first
        layout = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    scored_linears(layout, config.parameters)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or ANY_LENGTH
    if config.max_new_tokens >= positions:
        raise UserError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: the model holds {positions} tokens"
        )
    context = min(config.max_prompt_tokens + config.max_new_tokens, positions)
    choose_engine(config)
    sampling = SamplingOptions(temperature=1.0, top_p=1.0, max_new_tokens=config.max_new_tokens, seed=config.seed)
    return make_plan(config.model, config.dtype, config, context, sampling)


@ray.remote
def read_prompts(config: FisherConfig, longest: int) -> tuple[pa.Table, list[str]]:
    """(REQUESTS of the first usable prompts, cut at their start; places and reasons of those that are not usable)."""
    options = DataOptions(columns=config.columns, max_length=ANY_LENGTH)
    reader = PromptReader(make_encoder(config.model, options, config.trust_remote_code), ANY_LENGTH)
    refused: list[str] = []
    rows = islice(good_rows(plan_units(config.prompts), reader.read, refused), config.num_prompts)
    requests = [
        {
            "row_id": row_id,
            "carried": "",
            "prompt_ids": found.prompt_ids[-longest:],
            "seed": sample_seed(config.seed, row_id, 0),
            "reason": "",
        }
        for row_id, found in rows
    ]
    return pa.Table.from_pylist(requests, schema=REQUESTS), refused


@ray.remote
def make_fisher(
    config: FisherConfig, answers: list[ray.ObjectRef], refused: list[str], threads: int, counter: Any = None
) -> dict:
    """From samples to the file, on the machine that holds the model."""
    started = time.monotonic()
    prepare_worker(threads)
    scoring = load_model(config.model, config.dtype, trust_remote_code=config.trust_remote_code)
    rows = sorted((row for table in ray.get(answers) for row in table.to_pylist()), key=lambda row: row["row_id"])
    refused = refused + [f"sampling row {row['row_id']}: {row['reason']}" for row in rows if row["reason"]]
    samples = [(row["prompt_ids"], row["token_ids"]) for row in rows if not row["reason"]]
    groups = plan_batches([len(prompt) + len(answer) for prompt, answer in samples], config.batch_tokens)
    batches: Iterable[Batch] = (sampled_batch([samples[i] for i in group]).to(scoring.device) for group in groups)
    batches = counted(batches, tick_of(counter), "gradients", lambda batch: batch.input_ids.shape[0])
    found = diagonal_fisher(scoring, batches, config.parameters)
    report_refused("prompt", found.num_rows, refused)
    names = ("num_prompts", "max_prompt_tokens", "max_new_tokens", "seed", "columns")
    options = {name: getattr(config, name) for name in names}
    provenance = tensor_file.Provenance(
        kind="fisher",
        model_fingerprint=fingerprint(scoring.model),
        parameters=config.parameters,
        data_fingerprint=data_fingerprint(config.prompts),
        num_rows=found.num_rows,
        num_tokens=found.num_tokens,
        options=options | {"num_refused": len(refused), "engine": choose_engine(config)},
    )
    tensors = {f"fisher/{name}": tensor.cpu() for name, tensor in found.tensors.items()}
    tensor_file.save(config.output, tensor_file.TensorFile(provenance, tensors))
    metrics.count_file("fisher", asdict(provenance), time.monotonic() - started)
    return asdict(provenance)
