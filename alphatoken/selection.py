"""Values -> masks, in numpy, without a Python loop over rows.

    value(t) = adaptation(t) + stability_weight * stability(t)
    keep t where value(t) >= tau, tau = the k-th largest value of the scope, k = max(1, ceil(keep_fraction * n - 1e-9))

Arrays are flat, rows are given by offsets as in Arrow lists: row r is [offsets[r], offsets[r + 1]), offsets[0] is 0.
N response tokens, R rows. Ties with tau are kept, and a response always keeps a token.

Over a whole data set, the k-th largest is found exactly and in constant memory by radix selection: keys are split in
16-bit digits, and one pass per digit counts the next digit among the keys that begin with the digits found so far.
Counts of shards add up, so passes run anywhere and in any order.
"""

from collections.abc import Callable, Iterator

import numpy as np

from alphatoken.errors import UserError

BINS = 1 << 16
GRID_SIZE = 1 << 18  # elements of a padded block: fits a core's cache


def token_values(
    adaptation: np.ndarray, stability: np.ndarray, response_mask: np.ndarray, stability_weight: float
) -> np.ndarray:
    """float32 value of every position, 0 outside the response. May be non-finite where the inputs are."""
    with np.errstate(invalid="ignore", over="ignore"):
        values = adaptation.astype(np.float32) + np.float32(stability_weight) * stability.astype(np.float32)
    values[~response_mask] = 0
    return values


def count_per_row(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Number of true flags in each row, int64 (R,). Empty rows are fine (np.add.reduceat would not be)."""
    return np.diff(_cumulative(flags)[offsets])


def compact_offsets(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Offsets (R + 1,) of the rows in `array[flags]`."""
    return _cumulative(flags)[offsets]


def _cumulative(flags: np.ndarray) -> np.ndarray:
    total = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=total[1:])
    return total


def nonfinite_rows(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """True (R,) where a row has a NaN or an infinity."""
    finite = np.isfinite(values)
    if finite.all():
        return np.zeros(len(offsets) - 1, dtype=bool)
    return count_per_row(~finite, offsets) > 0


def class_numbers(wanted: list[str], accepted: list[str]) -> np.ndarray:
    """Numbers of token classes by name; UserError listing the accepted ones."""
    unknown = [name for name in wanted if name not in accepted]
    if unknown:
        raise UserError(f"--protect {' '.join(unknown)}: no such token class; there are {', '.join(accepted)}")
    return np.array([accepted.index(name) for name in wanted], dtype=np.int8)


def tokens_of_classes(input_ids: np.ndarray, class_of_token: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """True where a token's class is one of `numbers`. class_of_token: int8 by token id; ids beyond it have no class."""
    chosen = np.append(np.isin(class_of_token, numbers), False)  # the last entry stands for ids beyond the table
    return chosen[np.minimum(input_ids, len(class_of_token))]


def keep_count(keep_fraction: float, num_tokens: np.ndarray | int) -> np.ndarray:
    """k: how many of `num_tokens` are kept, ties aside. The 1e-9 keeps 0.1 * 30 from counting as more than 3."""
    return np.maximum(1, np.ceil(keep_fraction * np.asarray(num_tokens) - 1e-9)).astype(np.int64)


def keep_tokens(
    values: np.ndarray,
    offsets: np.ndarray,
    keep_fraction: float,
    protected: np.ndarray | None = None,
    threshold: float | None = None,
    min_value: float | None = None,
) -> np.ndarray:
    """True (N,) where a response token is kept: the paper's mask, with its options.

    A row that would keep nothing keeps its highest token. Nothing is checked here: values have to be finite.

    Args:
        values: float32 (N,), row after row, response tokens only.
        offsets: (R + 1,), where rows begin and end in `values`.
        keep_fraction: of each row's tokens, above 0 and at most 1; tokens as good as the last kept one are kept, too.
        protected: bool (N,), tokens that are kept and left out of the threshold.
        threshold: of a whole data set, in the place of each row's own.
        min_value: tokens of a lower value go as well.
    """
    if threshold is not None:
        keep = values >= np.float32(threshold)
    elif protected is None:
        keep = values >= np.repeat(row_thresholds(values, offsets, keep_fraction), np.diff(offsets))
    else:
        tau = row_thresholds(values[~protected], compact_offsets(~protected, offsets), keep_fraction)
        keep = values >= np.repeat(tau, np.diff(offsets))
    if min_value is not None:
        keep &= values >= np.float32(min_value)
    if protected is not None:
        keep |= protected
    return _keep_at_least_one(keep, values, offsets)


def _keep_at_least_one(keep: np.ndarray, values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    lengths = np.diff(offsets)
    empty = (count_per_row(keep, offsets) == 0) & (lengths > 0)
    if empty.any():
        highest = np.full(len(lengths), np.inf, dtype=np.float32)
        filled = lengths > 0
        highest[filled] = np.maximum.reduceat(values, offsets[:-1][filled])
        highest[~empty] = np.inf
        keep = keep | (values >= np.repeat(highest, lengths))
    return keep


def row_thresholds(values: np.ndarray, offsets: np.ndarray, keep_fraction: float) -> np.ndarray:
    """The k-th largest of each row's finite values, float32 (R,); infinity for an empty row."""
    thresholds = np.full(len(offsets) - 1, np.inf, dtype=np.float32)
    for rows, lengths, grid in _padded_blocks(values, offsets, fill=-np.inf):
        grid.sort(axis=1)  # ascending: padding comes first
        thresholds[rows] = grid[np.arange(len(rows)), grid.shape[1] - keep_count(keep_fraction, lengths)]
    return thresholds


def soft_weights(values: np.ndarray, keep: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """float32 (N,): 1 where kept; a dropped token has the share of its row's dropped tokens that are worse than it.

    So the worst dropped token has 0, and equal values have equal weights.
    """
    weights = np.ones(len(values), dtype=np.float32)
    dropped = ~keep
    weights[dropped] = _share_below(values[dropped], compact_offsets(dropped, offsets))
    return weights


def _share_below(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Share of a row's values that are strictly below each one, float32 in [0, 1)."""
    shares = np.zeros(len(values), dtype=np.float32)
    for rows, lengths, grid in _padded_blocks(values, offsets, fill=np.inf):
        order = np.argsort(grid, axis=1)  # padding comes last
        ordered = np.take_along_axis(grid, order, axis=1)
        rank = np.zeros(grid.shape, dtype=np.int64)
        rank[:, 1:] = np.where(ordered[:, 1:] != ordered[:, :-1], np.arange(1, grid.shape[1]), 0)
        np.maximum.accumulate(rank, axis=1, out=rank)  # equal values share the rank of the first of them
        inside = np.arange(grid.shape[1]) < lengths[:, None]
        target = offsets[:-1][rows][:, None] + order
        shares[target[inside]] = (rank / lengths[:, None])[inside]
    return shares


def _padded_blocks(
    values: np.ndarray, offsets: np.ndarray, fill: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(row numbers, their lengths, their values as a padded (rows, width) array) of rows of similar length."""
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    start = int(np.searchsorted(ordered, 1))  # empty rows have nothing to sort
    while start < len(order):
        widest = int(max(ordered[start] + 8, ordered[start] * 1.125))
        stop = min(int(np.searchsorted(ordered, widest, side="right")), start + max(1, GRID_SIZE // widest))
        rows, row_lengths = order[start:stop], ordered[start:stop]
        columns = np.arange(row_lengths[-1])
        index = offsets[:-1][rows][:, None] + columns
        grid = values[np.minimum(index, len(values) - 1)]
        grid[columns >= row_lengths[:, None]] = fill
        yield rows, row_lengths, grid
        start = stop


def float_digits(values: np.ndarray) -> list[np.ndarray]:
    """Two uint16 digits, highest first, that order like the float32 values (finite)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    keys = np.where(negative, ~bits, bits | np.uint32(1 << 31))
    return [(keys >> np.uint32(16)).astype(np.uint16), keys.astype(np.uint16)]


def digits_to_float(high: int, low: int) -> float:
    """The float32 that float_digits splits so."""
    key = (high << 16) | low
    bits = key ^ (1 << 31) if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def id_digits(row_ids: np.ndarray) -> list[np.ndarray]:
    """Four uint16 digits, highest first, that order like int64 row ids."""
    keys = np.ascontiguousarray(row_ids, dtype=np.int64).view(np.uint64) ^ np.uint64(1 << 63)
    return [(keys >> np.uint64(shift)).astype(np.uint16) for shift in (48, 32, 16, 0)]


def digit_histogram(digits: list[np.ndarray], prefix: tuple[int, ...]) -> np.ndarray:
    """How often each next digit follows `prefix`, int64 (65536,). Histograms of shards add up."""
    following = digits[len(prefix)]
    if prefix:
        inside = np.ones(len(following), dtype=bool)
        for digit, wanted in zip(digits, prefix, strict=False):
            inside &= digit == wanted
        following = following[inside]
    return np.bincount(following, minlength=BINS)


def select_key(
    histogram_after: Callable[[tuple[int, ...]], np.ndarray],
    num_digits: int,
    rank_of: Callable[[int], int],
    whole: bool = True,
) -> tuple[int, ...] | None:
    """Digits of the rank-th smallest key (from 1). rank_of turns the number of keys into the rank; below 1: None.

    `histogram_after(prefix)` is one pass over all keys. With whole=False the search stops at a prefix below or at
    which (see `at_most`) lie exactly `rank` keys: most often before the last digits.
    """
    prefix: tuple[int, ...] = ()
    rank = 0
    while len(prefix) < num_digits:
        histogram = histogram_after(prefix)
        if not prefix:
            rank = rank_of(int(histogram.sum()))
            if rank < 1:
                return None
        up_to = np.cumsum(histogram)
        digit = int(np.searchsorted(up_to, rank))
        rank -= int(up_to[digit] - histogram[digit])
        prefix += (digit,)
        if not whole and rank == histogram[digit]:
            break
    return prefix


def at_most(digits: list[np.ndarray], prefix: tuple[int, ...]) -> np.ndarray:
    """True where a key's first digits are lexicographically at or below `prefix`."""
    below = np.zeros(len(digits[0]), dtype=bool)
    equal = np.ones(len(digits[0]), dtype=bool)
    for digit, wanted in zip(digits, prefix, strict=False):
        below |= equal & (digit < wanted)
        equal &= digit == wanted
    return below | equal
