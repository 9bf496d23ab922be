"""Tables in, tables out: alignment, means, failures."""

import numpy as np
import pyarrow as pa
import torch
from tiny_models import random_rows, tiny_model

from alphatoken import schema
from alphatoken.baselines import Baseline
from alphatoken.batching import make_batch
from alphatoken.model import prepare_model
from alphatoken.scoring import NOT_FINITE, score_table
from alphatoken.values import TokenValues

CPU = torch.device("cpu")


def encoded(ids, masks) -> pa.Table:
    count = len(ids)
    return pa.table(
        {
            "row_id": list(range(100, 100 + count)),
            "id": [f"r{i}" for i in range(count)],
            "input_ids": ids,
            "response_mask": masks,
            "truncated": [False] * count,
        },
        schema=schema.ENCODED,
    )


def test_values_are_aligned_to_the_label_index_and_zero_elsewhere():
    ids, masks = random_rows(5, 9)
    estimator = Baseline(prepare_model(tiny_model("llama")), "loss")
    table, failures, computed = score_table(encoded(ids, masks), estimator, 64, CPU)
    assert not failures and computed >= sum(map(len, ids))
    assert table.schema.equals(schema.SCORED)
    for row, mask, found in zip(ids, masks, table.to_pylist(), strict=True):
        expected = estimator(make_batch([row], [mask])).adaptation.numpy()
        values = np.array(found["adaptation"])
        np.testing.assert_allclose(values[np.array(mask)], expected, rtol=1e-5)
        assert not values[~np.array(mask)].any()
        np.testing.assert_allclose(found["logprobs"], -values, rtol=1e-6)
        assert found["num_response_tokens"] == sum(mask)
        np.testing.assert_allclose(found["mean_loss"], expected.mean(), rtol=1e-5)
        np.testing.assert_allclose(found["mean_adaptation"], expected.mean(), rtol=1e-5)
        assert found["mean_stability"] == 0


def test_a_row_that_is_not_finite_fails_alone():
    ids, masks = random_rows(5, 4)

    def estimator(batch):
        values = torch.ones(batch.num_response_tokens)
        where = torch.cat([torch.full((n,), i) for i, n in zip(batch.row_ids, batch.response_mask.sum(1), strict=True)])
        values[where == 102] = torch.nan
        return TokenValues(values, torch.zeros_like(values), -torch.ones_like(values))

    _, failures, _ = score_table(encoded(ids, masks), estimator, 10**6, CPU)
    assert failures == {2: NOT_FINITE}


def test_other_columns_are_carried():
    ids, masks = random_rows(5, 2)
    table = encoded(ids, masks).append_column("source", pa.array(["a", "b"]))
    scored, _, _ = score_table(table, Baseline(prepare_model(tiny_model("llama")), "random"), 64, CPU)
    assert scored.column_names == [*schema.SCORED.names, "source"]


def test_no_rows_give_no_rows():
    """A block may hold refused rows only."""
    estimator = Baseline(prepare_model(tiny_model("llama")), "random")
    table, failures, computed = score_table(encoded([], []), estimator, 64, CPU)
    assert table.schema.equals(schema.SCORED) and table.num_rows == 0 and not failures and computed == 0
