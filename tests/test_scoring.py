"""Tables in, tables out: alignment, means, failures."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_models import VOCABULARY, random_rows, tiny_model

from alphatoken import schema, tensor_file
from alphatoken.architecture import scored_parameters
from alphatoken.baselines import Baseline
from alphatoken.batching import make_batch
from alphatoken.config import ScoreConfig
from alphatoken.errors import UserError
from alphatoken.exact import Exact
from alphatoken.failed_batches import is_out_of_memory
from alphatoken.model import fingerprint, load_model, prepare_model
from alphatoken.scoring import NOT_FINITE, _drift, score_table
from alphatoken.value_propagation import ValuePropagation
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", ["loss", "entropy", "forward", "central", "value_propagation"])
def test_a_model_that_overflows_on_a_token_leaves_other_rows_of_the_batch_alone(estimator, value):
    scoring = prepare_model(tiny_model("qwen2"))  # its head is not its embedding
    ids, masks = random_rows(5, 8)
    ids = [[min(token, VOCABULARY - 2) for token in row] for row in ids]
    weights = scored_parameters(scoring.model, "last-layers:2")
    tangents = [{name: torch.randn(p.shape) for name, p in weights.items()} for _ in range(2)]
    if estimator in ("forward", "central"):
        valued = Exact(scoring, "last-layers:2", *tangents, estimator)
    elif estimator == "value_propagation":
        valued = ValuePropagation(scoring, "last-layers:2", *tangents, 16)
    else:
        valued = Baseline(scoring, estimator)
    expected, failures, _ = score_table(encoded(ids, masks), valued, 10**6, CPU)
    assert not failures
    for row in (2, 5):
        ids[row][1] = VOCABULARY - 1
    with torch.no_grad():
        scoring.model.get_input_embeddings().weight[VOCABULARY - 1] = value
    table, failures, _ = score_table(encoded(ids, masks), valued, 10**6, CPU)
    assert failures == {2: NOT_FINITE, 5: NOT_FINITE}
    for i, (ours, theirs) in enumerate(zip(adaptation(table), adaptation(expected), strict=True)):
        np.testing.assert_allclose(ours, np.zeros(len(ours)) if i in failures else theirs, rtol=1e-5, atol=1e-6)


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


# What cannot be computed

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


class Failing:
    """An estimator that raises for chosen rows, and above a number of positions; it counts its calls."""

    def __init__(self, error=None, bad=(), most=10**9):
        self.error, self.bad, self.most, self.calls = error, set(bad), most, 0
        self.baseline = Baseline(prepare_model(tiny_model("llama")), "loss")

    def __call__(self, batch):
        self.calls += 1
        if batch.input_ids.numel() > self.most or self.bad & set(batch.row_ids.tolist()):
            raise self.error
        return self.baseline(batch)


def adaptation(table: pa.Table) -> list:
    return table["adaptation"].to_pylist()


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved_and_its_values_are_the_same(error):
    ids, masks = random_rows(5, 12)
    most = 2 * max(map(len, ids))
    estimator = Failing(error, most=most)
    expected, _, _ = score_table(encoded(ids, masks), estimator.baseline, 10**6, CPU)
    table, failures, computed = score_table(encoded(ids, masks), estimator, 10**6, CPU)
    assert is_out_of_memory(error) and not failures
    assert sum(map(len, ids)) <= computed <= 12 * most  # attempts in vain do not count
    for ours, theirs in zip(adaptation(table), adaptation(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_too_long_for_the_memory_is_put_aside():
    ids, masks = random_rows(5, 8)
    longest = max(range(8), key=lambda i: len(ids[i]))
    most = max(len(row) for i, row in enumerate(ids) if i != longest)
    table, failures, _ = score_table(encoded(ids, masks), Failing(OUT_OF_MEMORY[0], most=most), 10**6, CPU)
    assert list(failures) == [i for i, row in enumerate(ids) if len(row) > most]
    assert f"out of memory with this row alone in its batch ({len(ids[longest])} tokens)" in failures[longest]
    assert table.num_rows == 8 and not any(adaptation(table)[longest])


def test_a_block_of_rows_that_are_all_too_long_is_put_aside():
    ids, masks = random_rows(5, 3)
    _, failures, _ = score_table(encoded(ids, masks), Failing(OUT_OF_MEMORY[0], most=2), 10**6, CPU)
    assert set(failures) == {0, 1, 2}


def test_a_device_without_room_for_two_tokens_stops_the_run():
    ids, masks = random_rows(5, 3)
    with pytest.raises(UserError, match="None of 3 rows can be scored, nor two tokens alone: out of memory on cpu"):
        score_table(encoded(ids, masks), Failing(OUT_OF_MEMORY[0], most=1), 10**6, CPU)


def test_rows_whose_computation_fails_are_found_and_put_aside():
    ids, masks = random_rows(5, 16)
    estimator = Failing(IndexError("index 7 is out of range\nmore"), bad=[103, 110])
    table, failures, _ = score_table(encoded(ids, masks), estimator, 10**6, CPU)
    reason = "the computation of this row failed (IndexError: index 7 is out of range)"
    assert failures == {3: reason, 10: reason}
    assert estimator.calls < 20  # bisection, not one by one
    expected, _, _ = score_table(encoded(ids, masks), estimator.baseline, 10**6, CPU)
    for i, (ours, theirs) in enumerate(zip(adaptation(table), adaptation(expected), strict=True)):
        np.testing.assert_allclose(ours, np.zeros(len(ours)) if i in failures else theirs, rtol=1e-4, atol=1e-5)


def test_an_error_of_every_row_is_an_error():
    ids, masks = random_rows(5, 4)
    with pytest.raises(TypeError, match="wrong set-up") as found:
        score_table(encoded(ids, masks), Failing(TypeError("wrong set-up"), most=2), 10**6, CPU)
    assert "Every one of 4 rows failed like this" in found.value.__notes__[0]


def test_a_block_of_one_bad_row_is_put_aside_only_if_two_tokens_can_be_computed():
    ids, masks = random_rows(5, 1)
    _, failures, _ = score_table(encoded(ids, masks), Failing(ValueError("this row"), most=2), 64, CPU)
    assert failures == {0: "the computation of this row failed (ValueError: this row)"}
    with pytest.raises(ValueError, match="everything"):
        score_table(encoded(ids, masks), Failing(ValueError("everything"), most=0), 64, CPU)


@pytest.mark.parametrize(
    "error",
    [UserError("the model has another vocabulary"), RuntimeError("CUDA error: device-side assert triggered")],
)
def test_errors_that_no_smaller_batch_can_help_are_raised_at_once(error):
    ids, masks = random_rows(5, 6)
    estimator = Failing(error, bad=[100])
    with pytest.raises(type(error), match=str(error)):
        score_table(encoded(ids, masks), estimator, 10**6, CPU)
    assert estimator.calls == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [0.0, 1e-5])
def test_drift_is_that_of_the_stored_weights_in_whatever_dtype_is_computed(tmp_path, dtype, step):
    """Training moves weights by less than bfloat16 rounds them."""
    folder, moved = (str(tmp_path / name) for name in ("reference", "moved"))
    model = tiny_model("llama")
    model.save_pretrained(folder)
    reference = {name: p.detach().clone() for name, p in scored_parameters(model, "last-layers:1").items()}
    fisher = {name: torch.rand_like(tensor) for name, tensor in reference.items()}
    about = tensor_file.Provenance("fisher", fingerprint(model), "last-layers:1", "", 1, 1)
    path = str(tmp_path / "fisher.safetensors")
    tensor_file.save(path, tensor_file.TensorFile(about, {f"fisher/{name}": t for name, t in fisher.items()}))
    with torch.no_grad():
        for name, parameter in scored_parameters(model, "last-layers:1").items():
            parameter += step * torch.randn_like(reference[name])
    model.save_pretrained(moved)
    config = ScoreConfig(
        model=moved, data=["d"], output="o", direction="d", fisher=path, reference_model=folder, dtype=dtype
    )
    found = _drift(config, load_model(moved, dtype, CPU), "last-layers:1", {})
    for name, parameter in scored_parameters(model, "last-layers:1").items():
        torch.testing.assert_close(found[name], fisher[name] * (parameter.detach() - reference[name]))
    assert any(tensor.any() for tensor in found.values()) == bool(step)
