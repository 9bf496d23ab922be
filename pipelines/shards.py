"""Encoded or scored blocks to shards with commit records, and sums over those."""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from alphatoken import schema
from alphatoken.errors import UserError
from alphatoken.manifest import most_reasons
from alphatoken.run_folder import RunFolder, row_id_runs
from pipelines import metrics
from pipelines.encode import KEPT, ORIGIN

REASONS = 20  # that a manifest has


def write_block(block: pa.Table, output: str, cost: dict[str, float] | None = None) -> dict[str, list]:
    """Write one shard and its commit record; returns its counts, `cost` among them, as one row. cost: what scoring
    took; None: the rows are encoded only.
    """
    if not block.num_rows:
        return {}
    block = block.sort_by("row_id")
    good = pc.is_null(block["reason"])
    data = block.filter(good).drop_columns([field.name for field in ORIGIN])
    data = data.rename_columns([name.removeprefix(KEPT) for name in data.column_names])
    refused = block.filter(pc.invert(good))
    quarantine = refused.select(["row_id", "id", "source", "position", "reason"]).append_column(
        "stage", pa.array(["score" if n else "encode" for n in _had_tokens(refused)], pa.string())
    )
    counts = {
        "rows_in": block.num_rows,
        "rows_out": data.num_rows,
        "rows_quarantined": quarantine.num_rows,
        "rows_truncated": pc.sum(data["truncated"]).as_py() or 0,
        "rows_special_tokens": pc.sum(block["special_tokens"]).as_py() or 0,
        "tokens": num_tokens(data),
        "response_tokens": _response_tokens(data),
        **(cost or {}),
    }
    record = {
        "first_row_id": int(block["row_id"][0].as_py()),
        "row_ids": row_id_runs(block["row_id"].to_numpy()),
        "counts": counts,
        "reasons": dict(Counter(refused["reason"].to_pylist())),
        "worker": metrics.worker_id(),
        "seconds": (cost or {}).get("scoring_seconds", 0.0),
    }
    RunFolder(output).write_shard(data, quarantine.select(schema.QUARANTINE.names), record)
    metrics.count_shard("score" if cost else "encode", record)
    return {name: [value] for name, value in counts.items()}


def _response_tokens(table: pa.Table) -> int:
    if "response_mask" in table.column_names:
        return pc.sum(pc.list_flatten(table["response_mask"])).as_py() or 0
    branches = [name for name in ("chosen_ids", "rejected_ids") if name in table.column_names]
    return sum(pc.sum(pc.list_value_length(table[name])).as_py() or 0 for name in branches)


def num_tokens(table: pa.Table) -> int:
    """Of prompts and responses together."""
    return sum(int(pc.sum(pc.list_value_length(table[name])).as_py() or 0) for name in _id_columns(table))


def _id_columns(table: pa.Table) -> list[str]:
    """Where the tokens are: of a row with a response, or of a pair."""
    return [name for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if name in table.column_names]


def _had_tokens(table: pa.Table) -> list[bool]:
    return [bool(n) for n in pc.list_value_length(table[_id_columns(table)[0]]).to_pylist()]


def total_counts(folder: RunFolder, nothing: str = "no row can be used") -> dict:
    """Sums over all commit records, those of earlier attempts included. UserError that begins with `nothing` if no row
    came out.
    """
    total: Counter = Counter()
    reasons: Counter = Counter()
    for record in folder.commits():
        total.update(record["counts"])
        reasons.update(record["reasons"])
    if not total["rows_out"]:
        shown = "; ".join(reason for reason, _ in reasons.most_common(3)) or "the input has no rows"
        raise UserError(f"{nothing}: {shown}")
    counts = {name: round(value, 3) for name, value in total.items()}
    return counts | {"quarantine_reasons": most_reasons(reasons, REASONS)}
