"""A threshold per branch: each response its own, or one per branch over the data set."""

import numpy as np
import pyarrow as pa
import pytest

from alphatoken import schema, selection
from alphatoken.masking import MaskPlan
from alphatoken.pair_masking import mask_pair_table, pair_value_digits
from alphatoken.schema import BRANCHES
from alphatoken.window_masking import mask_window


def scored_pairs(count: int = 12, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        row = {"row_id": number, "id": f"p{number}", "prompt_ids": [5, 6], "truncated": False, "omega": 0.05}
        values = []
        for branch in BRANCHES:
            length = int(random.integers(1, 12))
            row[f"{branch}_ids"] = random.integers(3, 50, length).tolist()
            for name in ("adaptation", "stability", "logprobs", "ref_logprobs"):
                row[f"{branch}_{name}"] = random.normal(size=length).astype(np.float32).tolist()
            row[f"ref_{branch}_logps"] = -1.0
            values += row[f"{branch}_adaptation"]
        row |= {"num_response_tokens": len(values), "mean_adaptation": float(np.mean(values))}
        rows.append(row | {"mean_stability": 0.0, "mean_loss": 1.0})
    return rows


def masked(rows, plan, thresholds=None):
    table = pa.Table.from_pylist(rows, schema=schema.SCORED_PAIRS)
    return mask_pair_table(table, plan, thresholds or {}, "shard")


def value(row, branch, weight):
    return np.float32(row[f"{branch}_adaptation"]) + np.float32(weight) * np.float32(row[f"{branch}_stability"])


@pytest.mark.parametrize("keep", [0.3, 0.5, 1.0])
def test_each_response_has_its_own_threshold(keep):
    rows = scored_pairs()
    found = masked(rows, MaskPlan(keep, 1.5))
    assert found.data.schema.equals(pa.schema([*schema.SCORED_PAIRS, *schema.MASKED_PAIRS_EXTRA]))
    kept = 0
    for row, out in zip(rows, found.data.to_pylist(), strict=True):
        for branch in BRANCHES:
            values = value(row, branch, 1.5)
            k = max(1, int(np.ceil(keep * len(values) - 1e-9)))
            assert out[f"{branch}_mask"] == (values >= np.sort(values)[-k]).tolist()
            np.testing.assert_allclose(out[f"{branch}_value"], values, rtol=1e-6)
            kept += sum(out[f"{branch}_mask"])
    assert found.counts["kept_tokens"] == kept
    assert found.counts["response_tokens"] == sum(row["num_response_tokens"] for row in rows)


def test_one_threshold_per_branch_over_the_data_set():
    rows = scored_pairs(20, seed=3)
    plan = MaskPlan(0.4, 0.0)
    table = pa.Table.from_pylist(rows, schema=schema.SCORED_PAIRS)
    thresholds = {}
    for branch in BRANCHES:
        digits = pair_value_digits(table, plan, branch, "shard")
        values = np.concatenate([value(row, branch, 0.0) for row in rows])
        k = int(selection.keep_count(0.4, len(values)))
        key = selection.select_key(
            lambda prefix, digits=digits: selection.digit_histogram(digits, prefix), 2, lambda n, k=k: n - k + 1
        )
        thresholds[branch] = selection.digits_to_float(*key)
        assert thresholds[branch] == np.sort(values)[-k]
    for row, out in zip(rows, masked(rows, plan, thresholds).data.to_pylist(), strict=True):
        for branch in BRANCHES:
            values = value(row, branch, 0.0)
            expected = values >= max(thresholds[branch], -np.inf)
            if not expected.any():  # a response always keeps a token
                expected = values == values.max()
            assert out[f"{branch}_mask"] == expected.tolist()


def test_a_branch_that_is_not_finite_takes_its_pair_along():
    rows = scored_pairs(5)
    rows[2]["rejected_stability"][0] = float("nan")
    found = masked(rows, MaskPlan(0.5, 1.0))
    assert [row["row_id"] for row in found.data.to_pylist()] == [0, 1, 3, 4]
    assert found.counts["rows_quarantined"] == 1
    [refused] = found.quarantine.to_pylist()
    assert refused["row_id"] == 2 and "not finite" in refused["reason"]


def test_tokens_of_dropped_pairs_count_as_not_kept():
    rows = scored_pairs(10)
    rows[3]["chosen_adaptation"][0] = rows[3]["mean_adaptation"] = float("nan")
    plan = MaskPlan(0.5, 1.0, class_of_token=np.zeros(50, dtype=np.int8))
    [found] = mask_window([pa.Table.from_pylist(rows, schema=schema.SCORED_PAIRS)], plan, 0.4, False, "window")
    tokens = {row["row_id"]: row["num_response_tokens"] for row in rows if row["row_id"] != 3}
    stay = set(found.data["row_id"].to_pylist())
    assert found.counts["rows_dropped_sequences"] == 3 and found.counts["rows_quarantined"] == 1
    assert found.counts["response_tokens"] == sum(tokens.values()) == found.by_class[0, 0]
    assert found.counts["dropped_row_tokens"] == sum(tokens[row_id] for row_id in tokens.keys() - stay)


def test_protected_classes_and_floor_hold_in_both_branches():
    rows = scored_pairs(6)
    classes = np.zeros(50, dtype=np.int8)
    classes[30:] = 1
    plan = MaskPlan(0.2, 0.0, min_value=0.5, class_of_token=classes, protected_classes=np.array([1], dtype=np.int8))
    for row, out in zip(rows, masked(rows, plan).data.to_pylist(), strict=True):
        for branch in BRANCHES:
            keep = np.array(out[f"{branch}_mask"])
            protected = np.array(row[f"{branch}_ids"]) >= 30
            assert keep[protected].all() and keep.any()
            if protected.any():
                assert (value(row, branch, 0.0)[keep & ~protected] >= 0.5).all()
