"""What the stages do, as metrics of Ray, which every node offers to Prometheus; manifests have the same sums.

Each metric has the stage as a tag, and from Ray the worker's and the node's. Names begin with `ray_alphatoken_` there.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

BLOCK_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]  # bounds of the histogram
LONGEST_CLASS = 80
VARIABLE = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|\[[^]]*\]|U\+[0-9A-F]+|-?[0-9][0-9.,_]*""")

# Names in counts, and what the tag `kind` says.
ROWS = {"rows_in": "in", "rows_out": "out", "rows_quarantined": "quarantined", "rows_dropped_sequences": "dropped"}
TOKENS = {
    "tokens": "all", "prompt_tokens": "prompt", "response_tokens": "response", "kept_tokens": "kept",
    "dropped_row_tokens": "dropped",
}  # fmt: skip


def count_shard(stage: str, record: dict[str, Any]) -> None:
    """Add a finished shard to this process's metrics. `record` is what the commit record says."""
    if not ray.is_initialized():
        return
    counts, seconds = record["counts"], record.get("seconds")
    for kinds, metric in ((ROWS, _rows()), (TOKENS, _tokens())):
        for name, kind in kinds.items():
            if counts.get(name):
                metric.inc(counts[name], {"stage": stage, "kind": kind})
    for reason, rows in record.get("reasons", {}).items():
        _quarantined().inc(rows, {"stage": stage, "reason": reason_class(reason)})
    if "kept_tokens" in counts and counts["response_tokens"]:
        _kept_fraction().set(counts["kept_tokens"] / counts["response_tokens"], {"stage": stage})
    if idle := counts.get("idle_seconds"):
        _idle_seconds().inc(idle, {"stage": stage})
    if seconds:
        _busy_seconds().inc(seconds, {"stage": stage})
        _block_seconds().observe(seconds, {"stage": stage})
        tokens = counts.get("tokens", counts.get("response_tokens", 0))
        _tokens_per_second().set(tokens / seconds, {"stage": stage})


def count_steps(stage: str, steps: int, tokens: int) -> None:
    """Add optimizer steps, and the tokens that went through the model in them."""
    if not ray.is_initialized():
        return
    if steps:  # the last log line of a run has none: and Ray refuses to add nothing
        _steps().inc(steps, {"stage": stage})
    if tokens:
        _tokens().inc(tokens, {"stage": stage, "kind": "all"})


def count_file(stage: str, provenance: dict[str, Any], seconds: float) -> None:
    """Add what a direction or a Fisher was made from. `provenance`: as alphatoken.tensor_file.Provenance has it."""
    rows, refused = provenance["num_rows"], provenance["options"]["num_refused"]
    counts = {"rows_in": rows + refused, "rows_out": rows, "rows_quarantined": refused}
    count_shard(stage, {"counts": counts | {"response_tokens": provenance["num_tokens"]}, "seconds": seconds})


def reason_class(reason: str) -> str:
    """A reason for quarantine without what differs from row to row: Prometheus wants few values of a tag."""
    return VARIABLE.sub("...", reason.partition(": ")[0])[:LONGEST_CLASS]


def worker_id() -> str:
    """Of the actor that this is, else of the process."""
    if not ray.is_initialized():
        return "local"
    context = ray.get_runtime_context()
    return context.get_actor_id() or context.get_worker_id()


def time_per_worker(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the manifest, from commit records: what each worker did and in how many seconds, the busiest first. Where
    workers take turns at a device: the seconds in which it had nothing to do before a block.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if "worker" not in record:
            continue
        own = found.setdefault(
            record["worker"], {"worker": record["worker"], "shards": 0, "rows": 0, "response_tokens": 0, "seconds": 0.0}
        )
        own["shards"] += 1
        own["rows"] += record["counts"]["rows_in"]
        own["response_tokens"] += record["counts"].get("response_tokens", 0)
        own["seconds"] += record["seconds"]
        if "idle_seconds" in record["counts"]:
            own["idle_seconds"] = round(own.get("idle_seconds", 0.0) + record["counts"]["idle_seconds"], 3)
    busiest = sorted(found.values(), key=lambda own: -own["seconds"])
    return [own | {"seconds": round(own["seconds"], 3)} for own in busiest]


@cache
def _rows() -> Counter:
    return Counter("alphatoken_rows", "rows by what became of them", ("stage", "kind"))


@cache
def _tokens() -> Counter:
    return Counter("alphatoken_tokens", "tokens: all, of responses, kept by masks, of dropped rows", ("stage", "kind"))


@cache
def _steps() -> Counter:
    return Counter("alphatoken_steps", "optimizer steps", ("stage",))


@cache
def _quarantined() -> Counter:
    return Counter("alphatoken_quarantined", "rows in quarantine by kind of reason", ("stage", "reason"))


@cache
def _kept_fraction() -> Gauge:
    return Gauge("alphatoken_kept_fraction", "share of response tokens kept in the last shard", ("stage",))


@cache
def _tokens_per_second() -> Gauge:
    return Gauge("alphatoken_tokens_per_second", "of this worker, in the last block", ("stage",))


@cache
def _busy_seconds() -> Counter:
    return Counter("alphatoken_busy_seconds", "time this worker spent on blocks", ("stage",))


@cache
def _idle_seconds() -> Counter:
    return Counter("alphatoken_idle_seconds", "time for which this worker's device had no block before one", ("stage",))


@cache
def _block_seconds() -> Histogram:
    return Histogram("alphatoken_block_seconds", "time a block took", BLOCK_SECONDS, ("stage",))
