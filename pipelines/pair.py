"""RESPONSES folder in, PAIRS folder out: which response to a prompt is better, by a judge (pipelines/judges.py).

One Ray task per shard, one output shard per input shard, under the same name; a judge that needs a model sits in
actors, one that is an LLM behind an engine. Prompts without a pair are set aside with the reason, and counted.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data

from alphatoken import manifest as manifests
from alphatoken import schema, storage
from alphatoken.chat import ChatRenderer
from alphatoken.errors import UserError
from alphatoken.generate_config import PairConfig, SamplingOptions
from alphatoken.pairing import Candidate, Pair, best_against_worst, distinct
from alphatoken.run_folder import RunFolder, first_row_id_of, manifest_of, row_id_runs
from alphatoken.tokenizer import load_config, load_tokenizer
from alphatoken.verifiers import load_verifier
from pipelines import judges, metrics
from pipelines.cluster import MOST_DEATHS, actor_pool, connect, torch_threads, user_errors
from pipelines.engines import LOGICAL_CPUS, REQUESTS, answered, choose_engine, make_plan, sample_seed
from pipelines.judges import Group
from pipelines.shards import total_counts

logger = logging.getLogger(__name__)

# Settings that change where and how fast, but not what is written.
NOT_IDENTITY = {
    "output", "overwrite", "replicas", "gpus_per_replica", "cpus_per_replica", "tensor_parallel", "cpu_cache_gb",
    "engine_options", "batch_tokens",
}  # fmt: skip
NO_QUESTION = "no question"  # a request that keeps a shard without questions in the stream

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
    connect(LOGICAL_CPUS)
    with user_errors():
        _pair_shards(storage.list_shards(storage.absolute(config.input)), config, generated, folder, progress)
    counts = total_counts(folder, "no pair could be made")
    manifest = manifests.build_manifest(
        "pair", config.model_dump(mode="json"), counts, identity["fingerprints"], time.monotonic() - started,
        extra={"generated": {name: generated[name] for name in ("created", "config", "counts", "fingerprints")}},
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
    _check_judge(config)
    fingerprints = {**generated["fingerprints"], "generated_manifest": manifests.fingerprint(generated)}
    settings = config.model_dump(mode="json", exclude=NOT_IDENTITY) | {"input": source}
    return generated, {"stage": "pair", "config": settings, "fingerprints": fingerprints}


def _check_judge(config: PairConfig) -> None:
    if config.judge == "verifier":
        load_verifier(config.verifier, os.getcwd())
    elif config.judge == "reward-model":
        judges.check_reward_model(config)
    elif config.judge == "vllm-judge":
        assert config.judge_model is not None
        judges.read_template(config.judge_template)
        choose_engine(config)
        ChatRenderer(load_tokenizer(config.judge_model, config.trust_remote_code))


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
        written = _by_llm(rows, shared)
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
        return {"compute": pool, "max_task_retries": MOST_DEATHS, "num_cpus": 1}
    low, high = config.replica_range
    pool = actor_pool(low, high)
    resources = {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica}
    return {"compute": pool, "max_task_retries": MOST_DEATHS, **resources}


class PairShards:
    """Reads, judges and writes shards; only counts go back to the driver."""

    def __init__(self, config: PairConfig, samples: int, output: str, generated: dict, folder: str) -> None:
        self.config, self.samples, self.output = config, samples, output
        self.judge = _make_judge(config, generated, folder)

    def __call__(self, batch: dict) -> dict[str, list]:
        [shard] = batch["shard"]
        groups = read_groups(str(shard), self.samples)
        self.judge([group for group in groups if group.reason is None])
        return write_pairs(str(shard), groups, self.config, self.samples, self.output)


def _make_judge(config: PairConfig, generated: dict, folder: str) -> Callable[[list[Group]], None]:
    if config.judge == "verifier":
        return judges.Verifier(config, folder)
    if config.judge == "reference":
        return judges.Reference(config, generated)
    return judges.RewardModel(config, torch_threads(config.replica_range[1], config.cpus_per_replica))


def read_groups(shard: str, samples: int) -> list[Group]:
    """The prompts of a RESPONSES shard with their different responses, in order."""
    by_prompt: dict[int, list[dict]] = {}
    for row in storage.read_table(shard).to_pylist():
        by_prompt.setdefault(row["row_id"] // samples, []).append(row)
    groups = []
    for row_id, rows in sorted(by_prompt.items()):
        rows.sort(key=lambda row: row["sample"])
        responses = [Candidate(r["sample"], r["text"], r["token_ids"], r["finish_reason"] == "stop") for r in rows]
        candidates = distinct(responses)
        groups.append(Group(row_id, rows[0], candidates, len(responses) - len(candidates)))
    return groups


def write_pairs(shard: str, groups: list[Group], config: PairConfig, samples: int, output: str) -> dict[str, list]:
    """Choose pairs, write the shard and its commit record; returns its counts as one row."""
    records, refused = [], []
    for group in groups:
        found: list[Pair] | str = group.reason or ""
        if not group.reason:
            found = best_against_worst(group.candidates, group.scores, config.margin, config.max_pairs)
        if isinstance(found, str):
            refused.append(_set_aside(group, shard, found))
            continue
        for number, pair in enumerate(found):
            records.append(_record(group, pair, group.row_id * config.max_pairs + number))
    name = storage.name_of(shard)
    counts = {
        "prompts": len(groups),
        "rows_in": len(records) + len(refused),
        "rows_out": len(records),
        "rows_quarantined": len(refused),
        "identical_responses": sum(group.identical for group in groups),
    }
    record = {
        "first_row_id": first_row_id_of(name),
        "shard": name,
        "row_ids": row_id_runs([group.row_id for group in groups]),
        "counts": counts,
        "reasons": dict(Counter(row["reason"] for row in refused)),
    }
    data = pa.Table.from_pylist(records, schema=schema.PAIRS)
    RunFolder(output).write_shard(data, pa.Table.from_pylist(refused, schema=schema.QUARANTINE), record)
    metrics.count_shard("pair", record)
    return {key: [value] for key, value in counts.items()}


def _set_aside(group: Group, shard: str, reason: str) -> dict[str, Any]:
    place = {"row_id": group.row_id, "id": group.row["id"], "source": shard, "position": group.row["row_id"]}
    return place | {"stage": "pair", "reason": reason}


def _record(group: Group, pair: Pair, row_id: int) -> dict[str, Any]:
    row = {name: group.row[name] for name in ("id", "prompt", "messages", "prompt_ids")} | {"row_id": row_id}
    for branch, candidate, score in (
        ("chosen", pair.chosen, pair.chosen_score),
        ("rejected", pair.rejected, pair.rejected_score),
    ):
        row |= {branch: candidate.text, f"{branch}_ids": candidate.token_ids}
        row |= {f"{branch}_score": score, f"{branch}_sample": candidate.sample}
    return row


# an LLM as judge


def _by_llm(shards: ray.data.Dataset, shared: dict[str, Any]) -> ray.data.Dataset:
    config: PairConfig = shared["config"]
    assert config.judge_model is not None
    context = getattr(
        load_config(config.judge_model, config.trust_remote_code).get_text_config(), "max_position_embeddings", 4096
    )
    sampling = SamplingOptions(temperature=0, max_new_tokens=config.judge_tokens)
    plan = make_plan(config.judge_model, "auto", config, context, sampling)
    ask = partial(ask_questions, config=config, samples=shared["samples"], longest=context - config.judge_tokens)
    asked = shards.map_batches(ask, batch_size=1, num_cpus=0.5)
    return answered(asked, plan).map_batches(
        pair_by_verdicts, batch_size=None, batch_format="pyarrow", fn_kwargs=shared, num_cpus=0.5
    )


def ask_questions(batch: dict, config: PairConfig, samples: int, longest: int) -> pa.Table:
    """REQUESTS to the judge, all of a shard in one block."""
    [shard] = map(str, batch["shard"])
    assert config.judge_model is not None
    template = judges.read_template(config.judge_template)
    tokenizer = load_tokenizer(config.judge_model, config.trust_remote_code)
    chat = ChatRenderer(tokenizer)
    rows = [_request(json.dumps({"shard": shard}), [], NO_QUESTION)]
    for group in read_groups(shard, samples):
        for first, second, question in judges.questions(group, template):
            text = chat.render([{"role": "user", "content": question}], add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            reason = "" if len(ids) <= longest else f"the question has {len(ids)} tokens; {longest} are possible"
            rows.append(_request(judges.carried(group, shard, first, second), ids, reason))
    return pa.Table.from_pylist(rows, schema=REQUESTS)


def _request(carried: str, ids: list[int], reason: str) -> dict[str, Any]:
    return {"row_id": 0, "carried": carried, "prompt_ids": ids, "seed": sample_seed(0, 0, 0), "reason": reason}


def pair_by_verdicts(block: pa.Table, config: PairConfig, samples: int, output: str) -> dict[str, list]:
    """Verdicts of whole shards to pairs, written; returns their counts, a row per shard."""
    by_shard: dict[str, dict[int, dict]] = {}
    errors: dict[tuple[str, int], str] = {}
    for row in block.select(["carried", "text", "reason"]).to_pylist():
        place = json.loads(row["carried"])
        verdicts = by_shard.setdefault(place["shard"], {})
        if "first" in place:
            own = verdicts.setdefault(place["row_id"], {})
            own[place["first"], place["second"]] = judges.read_verdict(row["text"])
            if row["reason"]:
                errors[place["shard"], place["row_id"]] = row["reason"]
    total: dict[str, list] = {}
    for shard, verdicts in by_shard.items():
        groups = read_groups(shard, samples)
        contradictions = 0
        for group in groups:
            contradictions += judges.settle(group, verdicts.get(group.row_id, {}))
            if group.reason == "the judge gave no verdict":
                group.reason = errors.get((shard, group.row_id), group.reason)
        counts = write_pairs(shard, groups, config, samples, output) | {"inconsistent_verdicts": [contradictions]}
        for name, value in counts.items():
            total.setdefault(name, []).extend(value)
    return total
