"""One SCORED shard -> one MASKED shard, as Arrow tables; what is kept is decided in selection.py.

R rows, P positions of all rows, N response tokens among them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from alphatoken import schema, selection
from alphatoken.errors import UserError
from alphatoken.suspects import Bounds, TokenLosses
from alphatoken.targets import ADAPTATION, target_column

COMBINED = ("", "chosen_", "rejected_", "mean_")  # prefixes of the columns that targets are combined in
TOKEN_COLUMNS = ("input_ids", "adaptation", "stability")
STAYS, DROPPED, SUSPECT, NOT_FINITE, NO_RESPONSE = range(5)  # what becomes of a row


@dataclass(frozen=True)
class MaskPlan:
    """Everything that masking a shard needs to know."""

    keep_fraction: float
    stability_weight: float
    min_value: float | None = None
    weights: bool = False
    class_of_token: np.ndarray | None = None  # int8 by token id; None: not known
    protected_classes: np.ndarray | None = None  # int8
    drop_up_to: tuple[int, ...] | None = None  # digits of the highest (mean value, row id) that is dropped
    threshold: float | None = None  # one for the data set; None: one per response
    bounds: Bounds | None = None  # instead of a share: suspect tokens, if not protected, and suspect rows go
    bounds_and_value: bool = True  # with bounds: only tokens of a negative value are
    target_weights: Mapping[str, float] = field(default_factory=dict)  # by target; empty: adaptation as it was scored


@dataclass(frozen=True)
class MaskedShard:
    data: pa.Table  # MASKED
    quarantine: pa.Table  # QUARANTINE
    counts: dict[str, int]  # tokens are those of all rows that are not quarantined: dropped rows have no kept ones
    by_class: np.ndarray | None = None  # (C, 2) int64: response tokens and kept ones of each class


def mask_table(table: pa.Table, plan: MaskPlan, source: str) -> MaskedShard:
    """Mask a SCORED shard. `source` names it in the quarantine table and in the UserError for a malformed shard."""
    states = row_states(table, plan, source)
    stays = states == STAYS
    rows = table if stays.all() else table.filter(pa.array(stays))

    offsets, values, response_mask = _values(rows, plan, source)
    input_ids = flat(rows, "input_ids")
    response_offsets = selection.compact_offsets(response_mask, offsets)
    if plan.bounds is not None:
        keep = _unsuspected(rows, plan, source)
    else:
        keep = selection.keep_tokens(
            values[response_mask],
            response_offsets,
            plan.keep_fraction,
            protected=_protected(input_ids[response_mask], plan),
            threshold=plan.threshold,
            min_value=plan.min_value,
        )
    labels = np.full(len(values), schema.IGNORE_INDEX, dtype=np.int32)
    labels[response_mask] = np.where(keep, input_ids[response_mask], schema.IGNORE_INDEX)
    columns = [labels, values]
    if plan.weights:
        weights = np.zeros(len(values), dtype=np.float32)
        weights[response_mask] = selection.soft_weights(values[response_mask], keep, response_offsets)
        columns.append(weights)
    for new, column in zip([*schema.MASKED_EXTRA, schema.WEIGHTS], columns, strict=False):
        rows = rows.append_column(new, _lists(offsets, column, new.type))

    dropped = (states == DROPPED) | (states == SUSPECT)
    tokens, by_class = token_counts(input_ids[response_mask], keep, table.filter(pa.array(dropped)), plan)
    counts = {
        "rows_in": table.num_rows,
        "rows_out": rows.num_rows,
        "rows_quarantined": int((states > SUSPECT).sum()),
        "rows_dropped_sequences": int(dropped.sum()),
        **tokens,
    }
    return MaskedShard(rows, quarantine_table(table, states, plan, source), counts, by_class)


def token_counts(
    token_ids: np.ndarray, keep: np.ndarray, dropped: pa.Table, plan: MaskPlan
) -> tuple[dict[str, int], np.ndarray | None]:
    """Counts, and those by class (see MaskedShard): the response tokens of the rows that stay, and dropped rows."""
    left = flat(dropped, "input_ids")[flat(dropped, "response_mask")]
    counts = {
        "response_tokens": len(keep) + len(left),
        "kept_tokens": int(keep.sum()),
        "dropped_row_tokens": len(left),
    }
    nothing = np.zeros(len(left), dtype=bool)
    return counts, class_counts(np.concatenate([token_ids, left]), np.concatenate([keep, nothing]), plan)


def class_counts(token_ids: np.ndarray, keep: np.ndarray, plan: MaskPlan) -> np.ndarray | None:
    """(C, 2) int64: response tokens and kept ones of each class; None where classes are not known."""
    if plan.class_of_token is None:
        return None
    classes = classes_of(token_ids, plan.class_of_token)
    size = int(plan.class_of_token.max()) + 1
    parts = (classes[classes >= 0], classes[keep & (classes >= 0)])
    return np.stack([np.bincount(part, minlength=size) for part in parts], axis=1)


def classes_of(token_ids: np.ndarray, class_of_token: np.ndarray) -> np.ndarray:
    """int64 (N,): the class of each token; -1 for ids beyond the table."""
    numbers = np.append(class_of_token, np.int8(-1)).astype(np.int64)
    return numbers[np.minimum(token_ids, len(class_of_token))]


def row_states(table: pa.Table, plan: MaskPlan, source: str) -> np.ndarray:
    """STAYS, DROPPED, SUSPECT, NOT_FINITE or NO_RESPONSE for each row, int8 (R,)."""
    offsets, values, response_mask = _values(table, plan, source)
    means = row_means(table, plan)
    states = np.full(table.num_rows, STAYS, dtype=np.int8)
    if plan.drop_up_to is not None:
        states[selection.at_most(_row_digits(table, means), plan.drop_up_to)] = DROPPED
    if plan.bounds is not None:
        keep = _unsuspected(table, plan, source)
        states[selection.count_per_row(keep, selection.compact_offsets(response_mask, offsets)) == 0] = SUSPECT
    states[selection.nonfinite_rows(values, offsets) | ~np.isfinite(means)] = NOT_FINITE
    states[selection.count_per_row(response_mask, offsets) == 0] = NO_RESPONSE
    return states


def _unsuspected(table: pa.Table, plan: MaskPlan, source: str) -> np.ndarray:
    """True (N,) for the response tokens that the bounds let through; a protected class has none."""
    _, values, response_mask = _values(table, plan, source)
    assert plan.bounds is not None and plan.class_of_token is not None
    found, bounds = losses_of(table, plan.class_of_token), plan.bounds
    if plan.protected_classes is not None:
        bounds = bounds.without(plan.protected_classes)
    return bounds.keep(found, values[response_mask] if plan.bounds_and_value else None)


def losses_of(table: pa.Table, class_of_token: np.ndarray) -> TokenLosses:
    """What bounds are about, of a SCORED table."""
    response_mask = flat(table, "response_mask")
    classes = classes_of(flat(table, "input_ids")[response_mask], class_of_token)
    lengths = selection.count_per_row(response_mask, offsets_of(table, "response_mask"))
    return TokenLosses(-flat(table, "logprobs")[response_mask].astype(np.float64), classes, lengths)


def row_means(table: pa.Table, plan: MaskPlan) -> np.ndarray:
    """float32 (R,) mean value over each row's response tokens, of the means that SCORED carries."""
    adaptation, stability = table["mean_adaptation"].to_numpy(), table["mean_stability"].to_numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        return (adaptation + np.float32(plan.stability_weight) * stability).astype(np.float32)


ROW_COLUMNS = ["row_id", "num_response_tokens", "mean_adaptation", "mean_stability"]


def droppable_digits(table: pa.Table, plan: MaskPlan) -> list[np.ndarray]:
    """Sort keys (see selection.select_key) of the rows that may be dropped. Needs ROW_COLUMNS."""
    means = row_means(table, plan)
    usable = np.isfinite(means) & (table["num_response_tokens"].to_numpy() > 0)
    return [digit[usable] for digit in _row_digits(table, means)]


def value_columns(plan: MaskPlan) -> list[str]:
    """The columns that `value_digits` needs."""
    columns = ["row_id", "response_mask", "adaptation", "stability", "mean_adaptation", "mean_stability"]
    return columns if plan.protected_classes is None else [*columns, "input_ids"]


def value_digits(table: pa.Table, plan: MaskPlan, source: str) -> list[np.ndarray]:
    """Sort keys of the tokens that share the data set's threshold: unprotected, in rows that stay."""
    table = table.filter(pa.array(row_states(table, plan, source) == STAYS))
    _, values, response_mask = _values(table, plan, source)
    values = values[response_mask]
    if plan.protected_classes is not None:
        protected = _protected(flat(table, "input_ids")[response_mask], plan)
        assert protected is not None
        values = values[~protected]
    return selection.float_digits(values)


Count = Callable[[tuple[int, ...]], np.ndarray]  # a pass over all sort keys: histogram of the digit after a prefix


def with_dropped_rows(plan: MaskPlan, fraction: float, count: Count) -> MaskPlan:
    """The plan with the rows to drop. `count` is about `droppable_digits`."""
    if not fraction:
        return plan
    drop_up_to = selection.select_key(
        count, num_digits=6, rank_of=lambda rows: int(fraction * rows + 1e-9), whole=False
    )  # fmt: skip
    return replace(plan, drop_up_to=drop_up_to)


def common_threshold(keep_fraction: float, count: Count) -> float:
    """One threshold for all tokens; infinite where there is none to choose from. `count` is about `value_digits`."""
    key = selection.select_key(
        count,
        num_digits=2,
        rank_of=lambda tokens: tokens and tokens - int(selection.keep_count(keep_fraction, tokens)) + 1,
    )
    return selection.digits_to_float(*key) if key else np.inf


def combined(table: pa.Table, weights: Mapping[str, float]) -> pa.Table:
    """A SCORED or SCORED_PAIRS table whose adaptation and mean_adaptation are the weighted sums over targets.

    Columns that the table lacks are left alone, so a part of the columns can be combined. Summed in float64.
    """
    for prefix in COMBINED if weights else ():
        name = prefix + ADAPTATION
        if name not in table.column_names:
            continue
        summed = table.field(name)
        is_list = pa.types.is_list(summed.type)
        total = np.zeros(1)
        for target, weight in weights.items():
            own = prefix + target_column(target)
            total = total + weight * (flat(table, own) if is_list else table[own].to_numpy()).astype(np.float64)
        total = total.astype(np.float32)
        values = _lists(offsets_of(table, name), total, summed.type) if is_list else pa.array(total)
        table = table.set_column(table.column_names.index(name), summed, values)
    return table


def with_targets(columns: Sequence[str], weights: Mapping[str, float]) -> list[str]:
    """The columns, and those of the targets that `combined` needs for them."""
    prefixes = [name.removesuffix(ADAPTATION) for name in columns if name.endswith(ADAPTATION)]
    return [*columns, *(prefix + target_column(target) for prefix in prefixes for target in weights)]


def flat(table: pa.Table, name: str) -> np.ndarray:
    """The values of a list column, one row after the other."""
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _protected(token_ids: np.ndarray, plan: MaskPlan) -> np.ndarray | None:
    if plan.protected_classes is None:
        return None
    assert plan.class_of_token is not None
    return selection.tokens_of_classes(token_ids, plan.class_of_token, plan.protected_classes)


def _values(table: pa.Table, plan: MaskPlan, source: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offsets (R + 1,), values (P,), response_mask (P,)); UserError where the columns' lengths differ."""
    offsets = offsets_of(table, "response_mask")
    for name in TOKEN_COLUMNS:
        if name in table.column_names and not np.array_equal(offsets_of(table, name), offsets):
            raise UserError(f"{source}: {name} and response_mask differ in length; write the folder again with score")
    response_mask = flat(table, "response_mask")
    adaptation, stability = flat(table, "adaptation"), flat(table, "stability")
    return offsets, selection.token_values(adaptation, stability, response_mask, plan.stability_weight), response_mask


def _row_digits(table: pa.Table, means: np.ndarray) -> list[np.ndarray]:
    """Rows order by mean value, ties by row id, so that the number of dropped rows is exact."""
    return selection.float_digits(means) + selection.id_digits(table["row_id"].to_numpy())


def quarantine_table(table: pa.Table, states: np.ndarray, plan: MaskPlan, source: str) -> pa.Table:
    positions = np.flatnonzero(states != STAYS)
    means = row_means(table, plan)[positions]
    reasons = {
        DROPPED: "dropped sequence: its mean value {:.6g} is among the lowest",
        SUSPECT: "suspect row: its loss is above what validation rows have, or that of every token is (value {:.6g})",
        NOT_FINITE: "a value is not finite (mean value {:.6g})",
        NO_RESPONSE: "no response token",
    }
    columns = {
        "row_id": table["row_id"].to_numpy()[positions],
        "id": table["id"].take(pa.array(positions)),
        "source": [source] * len(positions),
        "position": positions,
        "stage": ["mask"] * len(positions),
        "reason": [reasons[int(state)].format(mean) for state, mean in zip(states[positions], means, strict=True)],
    }
    return pa.table(columns, schema=schema.QUARANTINE)


def offsets_of(table: pa.Table, name: str) -> np.ndarray:
    """Offsets of a list column, int64 (R + 1,), beginning with 0."""
    if not table.num_rows:
        return np.zeros(1, dtype=np.int64)
    offsets = table[name].combine_chunks().offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def _lists(offsets: np.ndarray, values: np.ndarray, list_type: pa.ListType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values), type=list_type)
