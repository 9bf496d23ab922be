"""One SCORED_PAIRS shard -> one MASKED_PAIRS shard: each branch is masked as if it were a data set of its own.

A branch becomes a SCORED table whose rows are all response, so thresholds, protected classes and floors are those of
masking.py. What becomes of a pair is decided for both branches together.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa

from alphatoken import masking, schema
from alphatoken.masking import DROPPED, STAYS, MaskedShard, MaskPlan
from alphatoken.schema import BRANCHES

Thresholds = dict[str, float]  # by branch; empty: one per response


def mask_pair_table(table: pa.Table, plan: MaskPlan, thresholds: Thresholds, source: str) -> MaskedShard:
    """Mask a SCORED_PAIRS shard. `source` names it in the quarantine table and in errors."""
    states = pair_states(table, plan, source)
    stays = states == STAYS
    rows = table if stays.all() else table.filter(pa.array(stays))
    dropped = table.filter(pa.array(states == DROPPED))
    masks, values, counted, by_class = [], [], Counter[str](), []
    for branch in BRANCHES:
        own = replace(plan, drop_up_to=None, weights=False, threshold=thresholds.get(branch))
        masked = masking.mask_table(branch_table(rows, branch), own, f"{source} ({branch})")
        labels, ids = masking.flat(masked.data, "labels"), masking.flat(masked.data, "input_ids")
        offsets = masking.offsets_of(masked.data, "input_ids")
        masks.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(labels == ids)))
        values.append(masked.data["value"])
        tokens, classes = masking.token_counts(ids, labels == ids, branch_table(dropped, branch), own)
        by_class.append(classes)
        counted.update(tokens)
    for field, column in zip(schema.MASKED_PAIRS_EXTRA, [*masks, *values], strict=True):
        rows = rows.append_column(field, column)
    counts = {
        "rows_in": table.num_rows,
        "rows_out": rows.num_rows,
        "rows_quarantined": int((states > DROPPED).sum()),
        "rows_dropped_sequences": int((states == DROPPED).sum()),
        **counted,
    }
    known = [counts_of for counts_of in by_class if counts_of is not None]
    whole = np.sum(known, axis=0) if known else None
    return MaskedShard(rows, masking.quarantine_table(table, states, plan, source), counts, whole)


def pair_states(table: pa.Table, plan: MaskPlan, source: str) -> np.ndarray:
    """What becomes of each pair (see masking.py), int8 (R,). A fault of either branch is the pair's."""
    whole = [masking.row_states(branch_table(table, branch), plan, f"{source} ({branch})") for branch in BRANCHES]
    return np.maximum(*whole)


def pair_value_digits(table: pa.Table, plan: MaskPlan, branch: str, source: str) -> list[np.ndarray]:
    """Sort keys of the tokens that share a branch's threshold over the data set: unprotected, in pairs that stay."""
    stays = pair_states(table, plan, source) == STAYS
    own = replace(plan, drop_up_to=None)
    return masking.value_digits(branch_table(table.filter(pa.array(stays)), branch), own, f"{source} ({branch})")


def pair_value_columns() -> list[str]:
    """The columns that `pair_value_digits` needs."""
    names = ("ids", "adaptation", "stability")
    shared = ["row_id", "mean_adaptation", "mean_stability"]
    return shared + [f"{branch}_{name}" for branch in BRANCHES for name in names]


def branch_table(table: pa.Table, branch: str) -> pa.Table:
    """A branch as SCORED rows that are all response. The means are the pair's: rows are dropped in pairs."""
    ids = table[f"{branch}_ids"].combine_chunks()
    offsets = masking.offsets_of(table, f"{branch}_ids")
    inside = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.ones(int(offsets[-1]), dtype=bool)))
    shared = [name for name in ("row_id", "id", "mean_adaptation", "mean_stability") if name in table.column_names]
    columns = {name: table[name] for name in shared} | {"input_ids": ids, "response_mask": inside}
    return pa.table(columns | {name: table[f"{branch}_{name}"] for name in ("adaptation", "stability")})
