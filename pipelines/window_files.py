"""The masked windows of a run in rounds, on disk.

    OUT/windows/<first step>/train-<part>.parquet   MASKED rows; also row_index, weights_step and age
    OUT/windows/<first step>/quarantine-<part>.parquet
    OUT/windows/<first step>/window.json            written last: a window with it is complete

`age` is the number of steps between the weights behind a row's values and the step that first trains on it.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import ray

from alphatoken import storage
from alphatoken.masking import MaskedShard, MaskPlan, losses_of
from alphatoken.rounds_config import RoundsConfig
from alphatoken.schedule import Schedule, Window
from alphatoken.suspects import Bounds, TokenLosses
from alphatoken.token_classes import class_of_ids
from alphatoken.train_config import BY_VALUE
from alphatoken.window_masking import keep_all_pairs, mask_window
from pipelines import metrics

SUMMARY = "window.json"


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
    validation: list[ray.ObjectRef],
) -> dict:
    """Mask a window's scored tables with common thresholds or bounds and write them; returns the summary. A plain
    window's tables are not scored, and nothing of them is masked. validation: losses of validation rows, for bounds.
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
        masked = [_with_aside(shard, aside, folder) for shard, (_, aside) in zip(masked, found, strict=True)]
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
    summary = {
        "start": window.start,
        "stop": window.stop,
        "weights_step": weights_step,
        "oldest_values": oldest,
        "counts": counts,
        "shards": [storage.join(folder, f"train-{part:05d}.parquet") for part in range(len(masked))],
    }
    storage.write_json(summary, storage.join(folder, SUMMARY))
    reasons = Counter(reason for shard in masked for reason in shard.quarantine["reason"].to_pylist())
    metrics.count_shard(config.stage, {"counts": counts, "reasons": reasons})
    return summary


def _with_aside(shard: MaskedShard, aside: pa.Table, folder: str) -> MaskedShard:
    """The shard, and in its quarantine the rows that could not be scored."""
    source = pa.array([folder] * aside.num_rows, pa.string())
    aside = aside.set_column(aside.column_names.index("source"), "source", source)
    counts = shard.counts | {name: shard.counts[name] + aside.num_rows for name in ("rows_in", "rows_quarantined")}
    return replace(shard, quarantine=pa.concat_tables([shard.quarantine, aside]), counts=counts)
