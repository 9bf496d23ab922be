"""vLLM through ray.data.llm: its replicas note what they compute, so that a prompt that kills engines is found.

requests -> vllm_request -> NotedEngine, in actors -> _answer -> ANSWERS
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from alphatoken.embedded import resolve_model
from alphatoken.generate_config import SamplingOptions
from alphatoken.model import planned_dtype
from alphatoken.tokenizer import load_tokenizer
from pipelines import metrics
from pipelines.cluster import torch_threads
from pipelines.engines import ANSWERS, REQUESTS, EnginePlan
from pipelines.poison import Attempt

ERROR = "__inference_error__"  # ray.data.llm's own: rows that have one pass its stages untouched
REQUESTS_PER_BATCH = 64
CONCURRENT_BATCHES = 16  # together more than an engine runs at once, so it never waits for rows
BATCHED_TOKENS = 4096  # of a vLLM step on CPUs, where whole prompts go in at once
STAGE = "vLLMEngineStage"
WATCH_SECONDS = 5.0

logger = logging.getLogger(__name__)


def answered_by_vllm(requests: ray.data.Dataset, plan: EnginePlan, notes: str) -> ray.data.Dataset:
    """As `engines.answered`."""
    processor = build_processor(
        vllm_config(plan),
        preprocess=partial(vllm_request, sampling=plan.sampling, end_ids=plan.end_ids),
        postprocess=partial(_answer, plan=plan),
        preprocess_map_kwargs={"num_cpus": 0.5},
        postprocess_map_kwargs={"num_cpus": 0.5},
    )
    stage = processor.get_stage_by_name(STAGE)
    known = stage.fn_constructor_kwargs | {"notes": notes, "batch_tokens": plan.batch_tokens}
    # A copy: on assignment its validator would take the resources for those of a GPU.
    processor.stages[STAGE] = stage.model_copy(update={"fn": NotedEngine, "fn_constructor_kwargs": known})
    return processor(requests).map_batches(_to_answers, batch_size=None, batch_format="pyarrow", num_cpus=0.5)


class NotedEngine(vLLMEngineStageUDF):
    """A replica. Its engine dies with all requests that are in it, so after a death those are asked in small parts, and
    nothing else meanwhile.
    """

    def __init__(self, *args: Any, notes: str, batch_tokens: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.notes, self.batch_tokens = notes, batch_tokens
        self.gate = Gate()
        self.counted_until = 0.0  # what of this replica's time is in some answer
        self.watching: asyncio.Task | None = None

    async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        started = time.monotonic()
        self.watching = self.watching or asyncio.create_task(self._watch())
        # Storage is waited for in other threads: this one also carries tokens from and to the engine.
        lengths = {int(row["row_id"]): len(row["prompt_ids"]) for row in batch}
        attempt = await asyncio.to_thread(Attempt.at, self.notes, lengths, self.batch_tokens)
        parts = attempt.parts()
        found: list[dict[str, Any]] = []
        async with self.gate.alone() if attempt.deaths else self.gate.shared():
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                async for answer in super().udf([batch[index] for index in part]):
                    found.append(answer)
        cost = self._cost(started, len(batch))
        for answer in found:
            yield answer | cost
        for index, reason in attempt.deadly.items():
            yield {self.IDX_IN_BATCH_COLUMN: batch[index][self.IDX_IN_BATCH_COLUMN], ERROR: reason} | cost
        # A later stage writes the shard: that needs no model and so is not where rows kill.
        await asyncio.to_thread(attempt.end)

    async def _watch(self) -> None:
        """Ends the process, as its parent class does, when the engine has died: a request that came in at that moment
        would wait for ever.
        """
        while not self.llm.engine.errored:
            await asyncio.sleep(WATCH_SECONDS)
        logger.error("the vLLM engine has died: the replica starts again")
        os._exit(1)

    def _cost(self, started: float, rows: int) -> dict[str, Any]:
        """Batches overlap: no second counts twice."""
        now = time.monotonic()
        seconds, self.counted_until = now - max(started, self.counted_until), now
        return {"worker": metrics.worker_id(), "seconds": seconds / rows}


class Gate:
    """Many are inside together, or one alone."""

    def __init__(self) -> None:
        self.inside, self.closed = 0, False
        self.changed = asyncio.Condition()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Waits while someone is, or wants to be, alone."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.closed)
            self.inside += 1
        try:
            yield
        finally:
            async with self.changed:
                self.inside -= 1
                self.changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Waits until everyone is out."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.closed)
            self.closed = True
            await self.changed.wait_for(lambda: not self.inside)
        try:
            yield
        finally:
            async with self.changed:
                self.closed = False
                self.changed.notify_all()


def vllm_config(plan: EnginePlan) -> Any:
    """ray.data.llm's configuration. The stages around the engine are off: prompts come as tokens."""
    options = plan.options
    on_gpu = options.gpus_per_replica > 0
    engine = {
        "dtype": planned_dtype(plan.dtype, options.gpus_per_replica),
        "max_model_len": plan.context,
        "trust_remote_code": plan.trust_remote_code,
        "tensor_parallel_size": options.tensor_parallel,
        "enable_prefix_caching": True,  # the samples of a prompt share it
        "disable_log_stats": True,
    }
    if not on_gpu:
        engine["enforce_eager"] = True  # compiling takes longer than it saves
        # A prompt in pieces rewinds the request's random generator, which kills the engine: generators on CPUs cannot.
        engine |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(plan.context, BATCHED_TOKENS)}
    low, high = options.replica_range
    bundle = {"CPU": options.cpus_per_replica} | ({"GPU": options.gpus_per_replica} if on_gpu else {})
    variables = {"VLLM_CPU_KVCACHE_SPACE": str(options.cpu_cache_gb), "VLLM_LOGGING_LEVEL": "WARNING"}
    if not on_gpu:
        # Ray would have it compute on as many threads as logical CPUs are reserved.
        variables["OMP_NUM_THREADS"] = str(torch_threads(high, options.cpus_per_replica))
    return vLLMEngineProcessorConfig(
        model_source=resolve_model(plan.model),
        engine_kwargs=engine | options.engine_options,
        concurrency=(low, high),
        placement_group_config={"bundles": [bundle] * options.tensor_parallel},
        runtime_env={"env_vars": variables},
        batch_size=REQUESTS_PER_BATCH,
        max_concurrent_batches=CONCURRENT_BATCHES,
        should_continue_on_error=True,
        log_engine_metrics=False,  # its exporter asks for Ray Serve
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def vllm_request(row: dict[str, Any], sampling: SamplingOptions, end_ids: tuple[int, ...]) -> dict[str, Any]:
    """What vLLM asks for. Neither engine uses the checkpoint's own generation settings."""
    settings = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": int(row["seed"]),
        "stop_token_ids": list(end_ids),
        "logprobs": 0,  # of the sampled token alone
    }
    if sampling.stop:
        settings["stop"] = list(sampling.stop)
    return {"tokenized_prompt": list(map(int, row["prompt_ids"])), "sampling_params": settings, ERROR: row["reason"]}


def _answer(row: dict[str, Any], plan: EnginePlan) -> dict[str, Any]:
    """A row of ANSWERS. Rows with an error do not come here."""
    tokens = [int(token) for token in row["generated_tokens"]]
    logprobs = row["logprobs"]
    stopped = len(tokens) < plan.sampling.max_new_tokens or tokens[-1] in plan.end_ids or _has_stop_text(tokens, plan)
    return {name: row[name] for name in REQUESTS.names} | {
        "token_ids": tokens,
        "text": row["generated_text"],
        "logprobs": logprobs
        and [float(found[token]["logprob"]) for token, found in zip(tokens, logprobs, strict=True)],
        "finish_reason": "stop" if stopped else "length",
        "worker": row["worker"],
        "seconds": row["seconds"],
    }


def _has_stop_text(tokens: list[int], plan: EnginePlan) -> bool:
    """Whether the last possible token completed a stop text: vLLM has cut that, and Ray drops why it ended."""
    if not plan.sampling.stop:
        return False
    text = _tokenizer(plan.model, plan.trust_remote_code).decode(tokens, skip_special_tokens=True)
    return any(stop in text for stop in plan.sampling.stop)


@cache
def _tokenizer(model: str, trust_remote_code: bool) -> Any:
    return load_tokenizer(model, trust_remote_code)


def _to_answers(block: pa.Table) -> pa.Table:
    """ANSWERS from what is left of a block: error rows have other columns than good ones."""
    rows = []
    for row in block.to_pylist():
        error = row.get(ERROR)
        rows.append({name: row.get(name) for name in ANSWERS.names} | {"reason": row["reason"] or _reason(error)})
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def _reason(error: str | None) -> str:
    """One line of an engine's error, without the class name in front."""
    return re.sub(r"^\w+(?:Error|Exception): ", "", error.strip().splitlines()[0]).rstrip(".") if error else ""
