"""RESPONSES folder in, PAIRS folder out: which response to a prompt is better, by a judge (pipelines/judges.py).

One Ray task per shard, one output shard per input shard, under the same name; a judge that needs a model sits in
actors, one that is an LLM behind an engine. Prompts without a pair are set aside with the reason, and counted.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray.data

from alphatoken import manifest as manifests
from alphatoken import schema, storage
from alphatoken.chat import ChatRenderer
from alphatoken.checkpoint_files import files_fingerprint
from alphatoken.errors import UserError
from alphatoken.generate_config import PairConfig
from alphatoken.run_folder import RunFolder, manifest_of
from alphatoken.tokenizer import load_tokenizer
from alphatoken.verifiers import verifier_source
from pipelines import judges, metrics
from pipelines.cluster import actor_pool, connect, torch_threads, user_errors
from pipelines.engines import choose_engine, engine_room
from pipelines.judges import Group
from pipelines.llm_judge import judged_by_llm
from pipelines.pair_shards import read_groups, write_pairs
from pipelines.poison import Attempt
from pipelines.shards import total_counts

logger = logging.getLogger(__name__)

# Settings that change where and how fast, but not what is written.
NOT_IDENTITY = {
    "output", "overwrite", "replicas", "gpus_per_replica", "cpus_per_replica", "tensor_parallel", "cpu_cache_gb",
    "batch_tokens",
}  # fmt: skip

Progress = Callable[[dict], None]  # called with running counts after every shard


def run_pair(config: PairConfig, progress: Progress | None = None) -> dict:
    """Write the PAIRS folder `config.output` and return its manifest. Resumes a run that was cut off.

    Raises UserError for anything that can be known to be wrong before a judge starts, and where no pair is left.
    """
    started = time.monotonic()
    generated, identity = check_pair(config)
    folder = RunFolder(storage.absolute(config.output))
    if folder.open(identity, config.overwrite) == "finished":
        logger.info("%s is already finished", folder.uri)
        return folder.manifest()
    connect(engine_room(config))
    with user_errors():
        _pair_shards(storage.list_shards(storage.absolute(config.input)), config, generated, folder, progress)
    counts = total_counts(folder, "no pair could be made")
    workers = metrics.time_per_worker(folder.commits())
    manifest = manifests.build_manifest(
        "pair", config.model_dump(mode="json"), counts, identity["fingerprints"], time.monotonic() - started,
        extra={"generated": {name: generated[name] for name in ("created", "config", "counts", "fingerprints")},
               "workers": workers},
    )  # fmt: skip
    folder.finish(manifest, manifests.data_card("pair", manifest, schema.PAIRS))
    return manifest


def check_pair(config: PairConfig) -> tuple[dict, dict]:
    """(manifest of the input, what the output folder keeps of the run). UserError for what can be known to be wrong."""
    source = storage.absolute(config.input)
    if storage.same_place(source, storage.absolute(config.output)):
        raise UserError(f"--output {config.output} is the input folder; give another one")
    generated = manifest_of(source, "generate", "--input")
    storage.list_shards(source)
    text = _check_judge(config)
    fingerprints = {**generated["fingerprints"], "generated_manifest": manifests.fingerprint(generated)}
    fingerprints |= {"judge": manifests.fingerprint(text)} if text else {}
    if config.judge in ("reward-model", "vllm-judge") and config.judge_model:
        fingerprints["judge_model_files"] = files_fingerprint(config.judge_model, config.trust_remote_code)
    settings = config.model_dump(mode="json", exclude=NOT_IDENTITY) | {"input": source}
    return generated, {"stage": "pair", "config": settings, "fingerprints": fingerprints}


def _check_judge(config: PairConfig) -> str | None:
    """What the user has written to judge by: the module of a verifier, or a template. UserError where it is no use."""
    if config.judge == "verifier":
        return verifier_source(config.verifier, os.getcwd())
    elif config.judge == "reward-model":
        judges.check_reward_model(config)
    elif config.judge == "vllm-judge":
        assert config.judge_model is not None
        choose_engine(config)
        ChatRenderer(load_tokenizer(config.judge_model, config.trust_remote_code))
        return judges.read_template(config.judge_template)
    return None


def _pair_shards(
    shards: list[str], config: PairConfig, generated: dict, folder: RunFolder, progress: Progress | None
) -> None:
    done = {record["shard"] for record in folder.commits()}
    todo = [shard for shard in shards if storage.name_of(shard) not in done]
    if done:
        logger.info("resuming: %d of %d shards were already finished", len(done), len(shards))
    if not todo:
        return
    rows = ray.data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo))
    shared: dict[str, Any] = {"config": config, "samples": generated["config"]["samples"], "output": folder.uri}
    if config.judge == "vllm-judge":
        written = judged_by_llm(rows, shared)
    else:
        written = rows.map_batches(
            PairShards, batch_size=1, fn_constructor_kwargs=shared | {"generated": generated, "folder": os.getcwd()},
            **_resources(config),
        )  # fmt: skip
    total: Counter = Counter()
    for record in folder.commits():
        total.update(record["counts"])
    for row in written.iter_rows():
        total.update(row)
        if progress:
            progress(dict(total))


def _resources(config: PairConfig) -> dict[str, Any]:
    """A judge with a model sits on the replicas that the user asked for; the others are light."""
    if config.judge != "reward-model":
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=4)
        return {"compute": pool, "num_cpus": 1}
    low, high = config.replica_range
    pool = actor_pool(low, high)
    resources = {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica}
    return {"compute": pool, **resources}


class PairShards:
    """Reads, judges and writes shards; only counts go back to the driver."""

    def __init__(self, config: PairConfig, samples: int, output: str, generated: dict, folder: str) -> None:
        self.config, self.samples, self.output = config, samples, output
        self.judge = _make_judge(config, generated, folder)

    def __call__(self, batch: dict) -> dict[str, list]:
        [shard] = batch["shard"]
        started = time.monotonic()
        groups = read_groups(str(shard), self.samples)
        attempt = self._judge({group.row_id: group for group in groups if group.reason is None})
        cost = {"worker": metrics.worker_id(), "seconds": round(time.monotonic() - started, 4)}
        counts = write_pairs(str(shard), groups, self.config, self.samples, self.output, cost)
        attempt.end()
        return counts

    def _judge(self, groups: dict[int, Group]) -> Attempt:
        """Scores, or reasons, for prompts by row id; of those that kill the process, the reason is that."""
        lengths = {
            row_id: sum(len(each.token_ids or []) for each in group.candidates) for row_id, group in groups.items()
        }
        attempt = Attempt.at(self.output, lengths, self.config.batch_tokens)
        in_order = list(groups.values())
        for part in attempt.parts():
            self.judge([in_order[index] for index in part])
        for index, reason in attempt.deadly.items():
            in_order[index].reason = reason
        return attempt


def _make_judge(config: PairConfig, generated: dict, folder: str) -> Callable[[list[Group]], None]:
    if config.judge == "verifier":
        return judges.Verifier(config, folder)
    if config.judge == "reference":
        return judges.Reference(config, generated)
    return judges.RewardModel(config, torch_threads(config.replica_range[1], config.cpus_per_replica))
