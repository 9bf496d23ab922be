"""The masked windows of a run in rounds, on disk.

    OUT/windows/<first step>/train-<part>.parquet   MASKED rows; also row_index, weights_step and age
    OUT/windows/<first step>/quarantine-<part>.parquet
    OUT/windows/<first step>/window.json            written last: a window with it is complete

`age` is the number of steps between the weights behind a row's values and the step that first trains on it.
"""

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import ray

from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.manifest import most_reasons, told_reasons
from alphatoken.masking import MaskedShard, MaskPlan, losses_of
from alphatoken.rounds_config import RoundsConfig
from alphatoken.schedule import Schedule, Window
from alphatoken.suspects import Bounds, TokenLosses
from alphatoken.token_classes import class_of_ids
from alphatoken.train_config import BY_VALUE
from alphatoken.window_masking import keep_all_pairs, mask_window
from pipelines import metrics
from pipelines.shards import REASONS

SUMMARY = "window.json"

logger = logging.getLogger(__name__)


def window_folder(output: str, start: int) -> str:
    return storage.join(output, "windows", f"{start:09d}")


def finished_windows(output: str, schedule: Schedule) -> dict[int, dict]:
    """First step -> summary of the windows that are complete."""
    found = {}
    for window in schedule.windows:
        summary = storage.join(window_folder(output, window.start), SUMMARY)
        if storage.exists(summary):
            found[window.start] = storage.read_json(summary)
    return found


@ray.remote(num_cpus=0.5)
def write_window(
    config: RoundsConfig,
    schedule: Schedule,
    window: Window,
    weights_step: int,
    output: str,
    scored: list[ray.ObjectRef],
    refused: list[ray.ObjectRef],
    validation: list[ray.ObjectRef],
) -> dict:
    """Mask a window's scored tables with common thresholds or bounds and write them; returns the summary. A plain
    window's tables are not scored, and nothing of them is masked. refused: QUARANTINE of rows that were not scored;
    validation: losses of validation rows, for bounds.
    """
    found = ray.get(scored)
    tables: list[pa.Table] = found if schedule.is_plain(window) else [table for table, _ in found]
    folder = window_folder(output, window.start)
    if schedule.is_plain(window):
        masked = [keep_all_pairs(table) for table in tables]
    else:
        plan = MaskPlan(config.keep_fraction, config.stability_weight)
        if validation:
            classes = class_of_ids(config.model, config.trust_remote_code)
            judged = TokenLosses.joined([losses_of(table, classes) for table in tables])
            bounds = Bounds.of(TokenLosses.joined(ray.get(validation)), judged)
            by_value = config.rule in BY_VALUE
            plan = replace(plan, bounds=bounds, bounds_and_value=by_value, class_of_token=classes)
        one_threshold = config.rule == "share" and config.scope == "window"
        masked = mask_window(tables, plan, config.drop_sequences, one_threshold, folder)
        masked = [_with_aside(shard, aside) for shard, (_, aside) in zip(masked, found, strict=True)]
    masked = [_with_aside(shard, aside) for shard, aside in zip(masked, ray.get(refused), strict=True)]
    rows, steps = schedule.rows_of(window)
    counts: dict[str, int] = {}
    oldest = 0
    for part, shard in enumerate(masked):
        ages = steps[np.searchsorted(rows, shard.data["row_index"].to_numpy())] - weights_step
        oldest = max(oldest, int(ages.max(initial=0)))
        data = shard.data.append_column("weights_step", pa.array(np.full(len(ages), weights_step, np.int64)))
        data = data.append_column("age", pa.array(ages.astype(np.int32)))
        storage.write_table(data, storage.join(folder, f"train-{part:05d}.parquet"))
        if shard.quarantine.num_rows:
            storage.write_table(shard.quarantine, storage.join(folder, f"quarantine-{part:05d}.parquet"))
        for name, value in shard.counts.items():
            counts[name] = counts.get(name, 0) + value
    reasons = Counter(reason for shard in masked for reason in shard.quarantine["reason"].to_pylist())
    summary = {
        "start": window.start,
        "stop": window.stop,
        "weights_step": weights_step,
        "oldest_values": oldest,
        "counts": counts,
        "quarantine_reasons": most_reasons(reasons, REASONS),
        "shards": [storage.join(folder, f"train-{part:05d}.parquet") for part in range(len(masked))],
    }
    storage.write_json(summary, storage.join(folder, SUMMARY))
    metrics.count_shard(config.stage, {"counts": counts, "reasons": reasons})
    return summary


def window_reasons(windows: dict[int, dict]) -> dict[str, int]:
    """Why rows of windows (by first step) are in quarantine, with counts."""
    reasons: Counter[str] = Counter()
    for found in windows.values():
        reasons.update(found.get("quarantine_reasons", {}))
    return most_reasons(reasons, REASONS)


def warn_without_pairs(window: Window, summary: dict) -> None:
    """Of a window whose prompts gave no pair: its steps change nothing."""
    counts = summary["counts"]
    if not counts["rows_out"]:
        logger.warning(
            "steps %d to %d train on nothing, since none of their %d prompts gave a pair: %s",
            window.start + 1, window.stop, counts["rows_in"], told_reasons(summary["quarantine_reasons"]),
        )  # fmt: skip


def check_pairs(windows: dict[int, dict], schedule: Schedule) -> None:
    """UserError where all windows of a run that generates are there, and none has a pair to train on."""
    if len(windows) < len(schedule.windows) or any(found["counts"]["rows_out"] for found in windows.values()):
        return
    raise UserError(
        f"no prompt gave a pair in any step, so there is nothing to train on: {told_reasons(window_reasons(windows))}; "
        "check --verifier and the answers in --data, or raise --generate, --temperature or --max-new-tokens, and give "
        "--overwrite"
    )


def _with_aside(shard: MaskedShard, aside: pa.Table) -> MaskedShard:
    """The shard, and in its quarantine the rows that gave no pair or could not be scored."""
    counts = shard.counts | {name: shard.counts[name] + aside.num_rows for name in ("rows_in", "rows_quarantined")}
    return replace(shard, quarantine=pa.concat_tables([shard.quarantine, aside]), counts=counts)
