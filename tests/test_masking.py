from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from alphatoken import schema
from alphatoken.errors import UserError
from alphatoken.masking import MaskPlan, mask_table
from alphatoken.suspects import Bounds
from alphatoken.window_masking import mask_window
from tests.scored_folder import VOCABULARY, scored_table

PLAN = MaskPlan(keep_fraction=0.5, stability_weight=1.5)


def test_labels_values_and_schema():
    table = scored_table(np.random.default_rng(0), first_row_id=5, num_rows=20)
    result = mask_table(table, PLAN, "shard")
    assert result.data.schema.names == [*table.schema.names, "labels", "value"]
    assert result.data.schema.field("labels") == schema.MASKED_EXTRA[0]
    assert result.data.select(table.schema.names).equals(table)
    assert result.quarantine.num_rows == 0
    for row in result.data.to_pylist():
        inside = np.array(row["response_mask"])
        values = np.array(row["adaptation"], np.float32) + np.float32(1.5) * np.array(row["stability"], np.float32)
        np.testing.assert_array_equal(np.array(row["value"], np.float32), np.where(inside, values, 0))
        count = -(-inside.sum() // 2)
        tau = np.sort(values[inside])[::-1][count - 1]
        expected = np.where(inside & (values >= tau), row["input_ids"], -100)
        assert row["labels"] == expected.tolist()


def test_a_slice_is_masked_like_the_whole():
    table = scored_table(np.random.default_rng(0), first_row_id=0, num_rows=20)
    whole = mask_table(table, PLAN, "shard").data
    assert mask_table(table.slice(7, 5), PLAN, "shard").data.equals(whole.slice(7, 5))
    two_chunks = pa.concat_tables([table.slice(0, 3), table.slice(3)])
    assert mask_table(two_chunks, PLAN, "shard").data.combine_chunks().equals(whole.combine_chunks())


def test_bad_rows_go_to_quarantine():
    table = scored_table(np.random.default_rng(0), first_row_id=0, num_rows=6)
    rows = table.to_pylist()
    rows[1]["adaptation"][-1] = float("nan")
    rows[2]["stability"][-1] = float("inf")
    rows[3]["response_mask"] = [False] * len(rows[3]["input_ids"])
    rows[4]["adaptation"][0] = float("nan")  # a prompt token: of no matter
    result = mask_table(pa.Table.from_pylist(rows, schema=table.schema), PLAN, "shard")
    assert result.data["row_id"].to_pylist() == [0, 4, 5]
    assert result.quarantine.schema == schema.QUARANTINE
    assert result.quarantine["position"].to_pylist() == [1, 2, 3]
    reasons = result.quarantine["reason"].to_pylist()
    assert [reason[:14] for reason in reasons] == ["a value is not", "a value is not", "no response to"]
    assert result.counts["rows_quarantined"] == 3 and result.counts["rows_in"] == 6


def test_all_rows_bad():
    table = scored_table(np.random.default_rng(0), first_row_id=0, num_rows=3)
    table = table.set_column(
        table.schema.get_field_index("mean_adaptation"), "mean_adaptation", pa.array([np.nan] * 3, pa.float32())
    )
    result = mask_table(table, PLAN, "shard")
    assert result.data.num_rows == 0 and result.quarantine.num_rows == 3 and result.counts["kept_tokens"] == 0


def test_columns_of_different_length_are_refused():
    rows = scored_table(np.random.default_rng(0), first_row_id=0, num_rows=3).to_pylist()
    rows[1]["stability"].append(0.0)
    with pytest.raises(UserError, match="shard-7: stability and response_mask differ"):
        mask_table(pa.Table.from_pylist(rows, schema=schema.SCORED), PLAN, "shard-7")


@pytest.mark.parametrize("by_value", [True, False])
def test_bounds_drop_suspect_tokens_and_rows(by_value):
    """Against a loop over rows; a row of which nothing is left is put aside with its reason."""
    table = scored_table(np.random.default_rng(3), first_row_id=0, num_rows=40)
    classes = (np.arange(VOCABULARY) % 2).astype(np.int8)
    bounds = Bounds(np.array([0.5, 1.0]), row=0.3)
    plan = MaskPlan(0.5, 1.5, class_of_token=classes, bounds=bounds, bounds_and_value=by_value)
    result = mask_table(table, plan, "shard")
    expected, aside = {}, []
    for row in table.to_pylist():
        inside = np.array(row["response_mask"])
        losses = -np.array(row["logprobs"])[inside]
        ids = np.array(row["input_ids"])[inside]
        values = (np.array(row["adaptation"]) + 1.5 * np.array(row["stability"]))[inside]
        suspect = losses > bounds.tokens[classes[ids]]
        keep = ~(suspect & (values < 0) if by_value else suspect) & (losses.mean() <= bounds.row)
        if keep.any():
            expected[row["row_id"]] = np.where(keep, ids, -100).tolist()
        else:
            aside.append(row["row_id"])
    assert aside and any(-100 in labels for labels in expected.values())
    found = {
        row["row_id"]: [label for label, inside in zip(row["labels"], row["response_mask"], strict=True) if inside]
        for row in result.data.to_pylist()
    }
    assert found == expected and result.quarantine["row_id"].to_pylist() == aside
    tokens = {row["row_id"]: sum(row["response_mask"]) for row in table.to_pylist()}
    assert result.counts["response_tokens"] == sum(tokens.values())  # tokens of dropped rows are not kept
    assert result.counts["dropped_row_tokens"] == sum(tokens[row_id] for row_id in aside)
    assert result.by_class.sum(axis=0).tolist() == [result.counts["response_tokens"], result.counts["kept_tokens"]]
    assert all(reason.startswith("suspect row") for reason in result.quarantine["reason"].to_pylist())
    assert result.counts["rows_dropped_sequences"] == len(aside) and result.counts["rows_quarantined"] == 0


@pytest.mark.parametrize(
    "one_threshold, bounds, drop",
    [(True, None, 0.0), (True, None, 0.5), (False, None, 0.0), (False, Bounds(np.full(3, 0.5), 5.0), 0.0)],
)
def test_an_actor_without_rows_leaves_a_window_to_the_others(one_threshold, bounds, drop):
    """All of its rows may have been put aside."""
    table = scored_table(np.random.default_rng(0), first_row_id=0, num_rows=9)
    plan = replace(PLAN, bounds=bounds, class_of_token=np.arange(VOCABULARY) % 3)
    (alone,) = mask_window([table], plan, drop, one_threshold, "window")
    for tables in ([table.slice(0, 0), table], [table, table.slice(0, 0)]):
        empty, whole = sorted(
            mask_window(tables, plan, drop, one_threshold, "window"), key=lambda shard: shard.data.num_rows
        )
        assert whole.data.equals(alone.data) and whole.counts == alone.counts
        assert empty.data.schema == alone.data.schema and not any(empty.counts.values())
