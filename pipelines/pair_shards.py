"""A shard of RESPONSES to groups of responses to one prompt, and judged groups to a shard of PAIRS."""

from collections import Counter
from typing import Any

import pyarrow as pa

from alphatoken import schema, storage
from alphatoken.generate_config import PairConfig
from alphatoken.pairing import Candidate, Pair, best_against_worst, distinct
from alphatoken.run_folder import RunFolder, first_row_id_of, row_id_runs
from pipelines import metrics
from pipelines.judges import Group


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
        empty = sum(not response.text.strip() for response in responses)
        reason = None if candidates else "all responses are empty"
        identical = len(responses) - empty - len(candidates)
        groups.append(Group(row_id, rows[0], candidates, identical, empty, reason=reason))
    return groups


def write_pairs(
    shard: str, groups: list[Group], config: PairConfig, samples: int, output: str, cost: dict[str, Any]
) -> dict[str, list]:
    """Choose pairs, write the shard and its commit record; returns its counts as one row. cost: who judged, for how
    long.
    """
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
        "empty_responses": sum(group.empty for group in groups),
    }
    record = {
        "first_row_id": first_row_id_of(name),
        "shard": name,
        "row_ids": row_id_runs([group.row_id for group in groups]),
        "counts": counts,
        "reasons": dict(Counter(row["reason"] for row in refused)),
        **cost,
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
