"""Against one row at a time in plain Python."""

import math

import numpy as np
import pytest

from alphatoken import selection
from alphatoken.errors import UserError


def random_rows(random, num_rows, longest=40, empty=False):
    """(rows of float32 values with ties and negative values, protected flags)"""
    rows, flags = [], []
    for _ in range(num_rows):
        length = int(random.integers(0 if empty else 1, longest))
        values = random.normal(size=length).astype(np.float32)
        if random.random() < 0.5:  # many ties, zeros of both signs
            values = (np.round(values) * random.choice([-1.0, 1.0], size=length)).astype(np.float32)
        rows.append(values)
        flags.append(random.random(length) < random.choice([0.0, 0.3, 1.0]))
    return rows, flags


def flatten(rows):
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.concatenate(rows), offsets


def expected_keep(values, protected, keep_fraction, threshold, min_value):
    """One row, as the rule says it."""
    values = values.tolist()
    if not values:
        return []
    open_values = sorted((v for v, p in zip(values, protected, strict=True) if not p), reverse=True)
    if threshold is None:
        k = max(1, math.ceil(keep_fraction * len(open_values) - 1e-9))
        tau = open_values[k - 1] if open_values else math.inf
    else:
        tau = threshold
    keep = []
    for value, is_protected in zip(values, protected, strict=True):
        kept = value >= tau and (min_value is None or value >= min_value)
        keep.append(bool(kept or is_protected))
    return keep if any(keep) else [value == max(values) for value in values]


def expected_weights(values, keep):
    dropped = [value for value, kept in zip(values.tolist(), keep, strict=True) if not kept]
    return [
        1.0 if kept else sum(other < value for other in dropped) / len(dropped)
        for value, kept in zip(values.tolist(), keep, strict=True)
    ]


@pytest.mark.parametrize("keep_fraction", [0.01, 0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("min_value", [None, 0.0, 1.5])
@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
def test_keep_and_weights(keep_fraction, protect, min_value, threshold):
    random = np.random.default_rng(1)
    rows, flags = random_rows(random, 150, empty=True)
    flags = flags if protect else [np.zeros(len(row), dtype=bool) for row in rows]
    values, offsets = flatten(rows)
    protected = np.concatenate(flags) if protect else None
    keep = selection.keep_tokens(values, offsets, keep_fraction, protected, threshold, min_value)
    weights = selection.soft_weights(values, keep, offsets)
    for number, (row, flag) in enumerate(zip(rows, flags, strict=True)):
        part = slice(offsets[number], offsets[number + 1])
        assert keep[part].tolist() == expected_keep(row, flag, keep_fraction, threshold, min_value)
        np.testing.assert_allclose(weights[part], expected_weights(row, keep[part]), rtol=1e-6)
        assert len(row) == 0 or keep[part].any()


def test_lengths_that_fill_many_blocks(monkeypatch):
    monkeypatch.setattr(selection, "GRID_SIZE", 64)
    random = np.random.default_rng(2)
    rows, flags = random_rows(random, 300, longest=200)
    values, offsets = flatten(rows)
    keep = selection.keep_tokens(values, offsets, 0.4)
    none = [np.zeros(len(row), dtype=bool) for row in rows]
    expected = [expected_keep(row, flag, 0.4, None, None) for row, flag in zip(rows, none, strict=True)]
    assert keep.tolist() == sum(expected, [])


def test_simple_cases():
    def keep(values, **options):
        array = np.array(values, dtype=np.float32)
        return selection.keep_tokens(array, np.array([0, len(values)]), **options).tolist()

    assert keep([3, 1, 2, 4], keep_fraction=0.5) == [True, False, False, True]
    assert keep([1, 1, 1, 0], keep_fraction=0.25) == [True, True, True, False]  # ties stay
    assert keep([-5], keep_fraction=0.01) == [True]
    assert keep([-5, -6], keep_fraction=1.0, min_value=0.0) == [True, False]
    assert sum(keep(list(range(30)), keep_fraction=0.1)) == 3  # 0.1 * 30 is 3.0000000000000004
    assert keep([0, 0], keep_fraction=0.5, threshold=math.inf) == [True, True]
    assert selection.keep_tokens(np.zeros(0, np.float32), np.array([0]), 0.5).tolist() == []


def test_token_values_and_row_flags():
    mask = np.array([False, True, True, True])
    adaptation = np.array([np.nan, 1, np.inf, 2], np.float32)
    values = selection.token_values(adaptation, np.array([0, 2, 0, -1], np.float32), mask, 1.5)
    np.testing.assert_array_equal(values, np.array([0, 4, np.inf, 0.5], np.float32))
    assert values.dtype == np.float32
    assert selection.nonfinite_rows(values, np.array([0, 2, 2, 4])).tolist() == [False, False, True]
    assert selection.count_per_row(mask, np.array([0, 2, 2, 4])).tolist() == [1, 0, 2]
    assert selection.compact_offsets(mask, np.array([0, 2, 2, 4])).tolist() == [0, 1, 1, 3]


def test_classes():
    accepted = ["word", "number", "end-of-turn"]
    numbers = selection.class_numbers(["end-of-turn", "number"], accepted)
    classes = np.array([0, 1, 2, -1], dtype=np.int8)
    token_ids = np.array([0, 1, 2, 3, 4, 999], dtype=np.int32)
    assert selection.tokens_of_classes(token_ids, classes, numbers).tolist() == [False, True, True] + [False] * 3
    with pytest.raises(UserError, match="wird: no such token class; there are word, number, end-of-turn"):
        selection.class_numbers(["word", "wird"], accepted)


def test_digits_order_like_numbers():
    values = np.array([-np.float32(3e38), -1, -1e-45, -0.0, 0.0, 1e-45, 1, 3e38], np.float32)
    high, low = selection.float_digits(values)
    keys = (high.astype(np.int64) << 16) | low
    assert (np.diff(keys) > 0).all()
    pairs = zip(high.tolist(), low.tolist(), strict=True)
    assert [selection.digits_to_float(*pair) for pair in pairs] == values.tolist()
    ids = np.array([-5, 0, 1, 70_000, 10**14, 2**62], dtype=np.int64)
    parts = selection.id_digits(ids)
    assert sorted(zip(*[part.tolist() for part in parts], strict=True)) == list(
        zip(*[part.tolist() for part in parts], strict=True)
    )


def shards_histogram(shards):
    return lambda prefix: sum(selection.digit_histogram(digits, prefix) for digits in shards)


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_data_set_threshold_is_the_exact_one(fraction, ties):
    random = np.random.default_rng(3)
    values = random.normal(size=5000).astype(np.float32) * np.float32(1e-3)
    values = np.round(values, 3) if ties else values
    shards = [selection.float_digits(part) for part in np.array_split(values, 7)]
    key = selection.select_key(shards_histogram(shards), 2, lambda n: n - int(selection.keep_count(fraction, n)) + 1)
    k = max(1, math.ceil(fraction * len(values) - 1e-9))
    assert selection.digits_to_float(*key) == np.sort(values)[::-1][k - 1]


@pytest.mark.parametrize("num_dropped", [0, 1, 17, 250, 999])
@pytest.mark.parametrize("spread", [0, 2, 10**6])
def test_lowest_rows_are_exactly_so_many_and_ties_go_by_id(num_dropped, spread):
    random = np.random.default_rng(4)
    means = random.integers(-spread, spread + 1, size=1000).astype(np.float32)
    ids = random.permutation(10**10 + np.arange(1000) * 37)
    digits = selection.float_digits(means) + selection.id_digits(ids)
    shards = [[digit[part] for digit in digits] for part in np.array_split(np.arange(1000), 5)]
    prefix = selection.select_key(shards_histogram(shards), 6, lambda _: num_dropped, whole=False)
    dropped = selection.at_most(digits, prefix) if prefix else np.zeros(1000, dtype=bool)
    assert set(np.flatnonzero(dropped)) == set(np.lexsort((ids, means))[:num_dropped])
