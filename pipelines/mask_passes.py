"""Passes over all shards of a SCORED folder that count, before anything is masked: thresholds, dropped rows, bounds.

One Ray task sums over several shards; the driver adds up small arrays.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from alphatoken import masking, schema, selection, storage
from alphatoken.masking import MaskPlan
from alphatoken.pair_masking import Thresholds, pair_value_columns, pair_value_digits
from alphatoken.suspects import Bounds, LossProfile, counts_above

ROWS = "rows"  # the threshold's name where rows are not pairs; there each branch has one

CountShard = Callable[[str], np.ndarray]  # of one shard: an array of counts, the same shape for all


def bounds(plan: MaskPlan, shards: list[str], profile: LossProfile) -> Bounds:
    """How large losses may be, by what all rows together have in excess of the validation rows."""
    return profile.bounds(_count_all(shards, partial(_losses_above, plan=plan, candidates=profile.candidates)))


def with_dropped_rows(plan: MaskPlan, shards: list[str], fraction: float) -> MaskPlan:
    """The plan with the rows to drop: the share of them with the lowest mean value."""
    return masking.with_dropped_rows(plan, fraction, partial(_count_digits, shards, _droppable_digits, plan))


def thresholds(plan: MaskPlan, shards: list[str], scope: str, pairs: bool) -> Thresholds:
    """The data set's thresholds, by branch for pairs; empty where each response has its own or bounds decide."""
    if scope != "dataset" or plan.bounds is not None:
        return {}
    branches = {branch: partial(_pair_digits, branch) for branch in schema.BRANCHES}
    digits_of = branches if pairs else {ROWS: _value_digits}
    return {
        name: masking.common_threshold(plan.keep_fraction, partial(_count_digits, shards, digits, plan))
        for name, digits in digits_of.items()
    }


def finite(found: Thresholds, pairs: bool) -> Any:
    """The thresholds as JSON: of rows a number, of pairs by branch."""
    numbers = {name: value if np.isfinite(value) else None for name, value in found.items()}
    return (numbers or None) if pairs else numbers.get(ROWS)


def read(shard: str, plan: MaskPlan, columns: list[str] | None = None) -> pa.Table:
    """A shard, or some columns of it, with targets combined as the plan says."""
    wanted = None if columns is None else masking.with_targets(columns, plan.target_weights)
    return masking.combined(storage.read_table(shard, wanted), plan.target_weights)


def _losses_above(shard: str, plan: MaskPlan, candidates: np.ndarray) -> np.ndarray:
    assert plan.class_of_token is not None
    table = read(shard, plan, ["row_id", "input_ids", "response_mask", "logprobs"])
    return counts_above(masking.losses_of(table, plan.class_of_token), candidates)


def _droppable_digits(shard: str, plan: MaskPlan) -> list[np.ndarray]:
    return masking.droppable_digits(read(shard, plan, masking.ROW_COLUMNS), plan)


def _value_digits(shard: str, plan: MaskPlan) -> list[np.ndarray]:
    return masking.value_digits(read(shard, plan, masking.value_columns(plan)), plan, shard)


def _pair_digits(branch: str, shard: str, plan: MaskPlan) -> list[np.ndarray]:
    return pair_value_digits(read(shard, plan, pair_value_columns()), plan, branch, shard)


def _count_digits(shards: list[str], digits_of: Callable, plan: MaskPlan, prefix: tuple[int, ...]) -> np.ndarray:
    """The histogram of the digit after `prefix`."""
    return _count_all(shards, partial(_digit_histogram, digits_of=digits_of, plan=plan, prefix=prefix))


def _digit_histogram(shard: str, digits_of: Callable, plan: MaskPlan, prefix: tuple[int, ...]) -> np.ndarray:
    return selection.digit_histogram(digits_of(shard, plan), prefix)


def _count_all(shards: list[str], count: CountShard) -> np.ndarray:
    """One pass over all shards. A task sums over its shards."""
    tasks = min(len(shards), 4 * int(ray.cluster_resources().get("CPU", 1)))
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=tasks)
    counted = rows.map_batches(_count_shards, batch_size=None, fn_kwargs={"count": count})
    return reduce(np.add, (row["counts"] for row in counted.iter_rows()))


def _count_shards(batch: dict[str, np.ndarray], count: CountShard) -> dict[str, np.ndarray]:
    return {"counts": reduce(np.add, (count(str(shard)) for shard in batch["shard"]))[None]}
