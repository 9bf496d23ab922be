"""SCORED tables that are all in memory and share their thresholds -> MASKED ones: a window of a run in rounds."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa

from alphatoken import masking, schema, selection
from alphatoken.masking import MaskedShard, MaskPlan
from alphatoken.pair_masking import mask_pair_table, pair_value_digits
from alphatoken.schema import BRANCHES

Digits = Callable[[pa.Table], list[np.ndarray]]


def mask_window(
    tables: list[pa.Table], plan: MaskPlan, drop_sequences: float, one_threshold: bool, source: str
) -> list[MaskedShard]:
    """Mask rows, or pairs with a threshold for each branch. `source` names the window in quarantine."""

    def count(digits: Digits) -> masking.Count:
        return lambda prefix: np.sum([selection.digit_histogram(digits(t), prefix) for t in tables], axis=0)

    plan = masking.with_dropped_rows(plan, drop_sequences, count(lambda table: masking.droppable_digits(table, plan)))
    if "chosen_ids" not in tables[0].column_names:
        if one_threshold:
            digits = count(lambda table: masking.value_digits(table, plan, source))
            plan = replace(plan, threshold=masking.common_threshold(plan.keep_fraction, digits))
        return [masking.mask_table(table, plan, source) for table in tables]
    thresholds = {
        branch: masking.common_threshold(plan.keep_fraction, count(_of_branch(branch, plan, source)))
        for branch in (BRANCHES if one_threshold else ())
    }
    return [mask_pair_table(table, plan, thresholds, source) for table in tables]


def _of_branch(branch: str, plan: MaskPlan, source: str) -> Digits:
    return lambda table: pair_value_digits(table, plan, branch, source)


def keep_all_pairs(table: pa.Table) -> MaskedShard:
    """ENCODED_PAIRS that are trained on whole."""
    tokens = 0
    for branch in BRANCHES:
        ids = table[f"{branch}_ids"].combine_chunks()
        offsets = masking.offsets_of(table, f"{branch}_ids")
        kept = np.ones(int(offsets[-1]), dtype=bool)
        table = table.append_column(f"{branch}_mask", pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), kept))
        tokens += len(ids.flatten())
    counts = {"rows_in": table.num_rows, "rows_out": table.num_rows, "response_tokens": tokens, "kept_tokens": tokens}
    left_out = dict.fromkeys(("rows_quarantined", "rows_dropped_sequences", "dropped_row_tokens"), 0)
    return MaskedShard(table, schema.QUARANTINE.empty_table(), counts | left_out)
