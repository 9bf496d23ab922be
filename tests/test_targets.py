"""Several validation targets in one pass: the same values as each alone, and what is shared."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from oracles import relative_error
from pair_rows import encoded_pairs, random_pairs
from pydantic import ValidationError
from scored_folder import scored_table
from tiny_models import random_rows, tiny_model

from alphatoken import hidden_tangent, masking
from alphatoken.architecture import decoder_layers, scored_parameters
from alphatoken.batching import make_batch
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.errors import UserError
from alphatoken.exact import Exact
from alphatoken.mask_config import MaskConfig
from alphatoken.masking import MaskPlan, mask_table
from alphatoken.model import ScoringModel, prepare_model
from alphatoken.pair_scoring import PairEstimator, score_pair_table
from alphatoken.rounds_config import RoundsConfig
from alphatoken.scoring import score_table
from alphatoken.targets import files_by_target, target_names, validation_files, weights_of
from alphatoken.train_config import TrainConfig
from alphatoken.value_propagation import ValuePropagation
from alphatoken.values import Targets

CPU = torch.device("cpu")
SAME = 1e-6
SAME_OF_EXPERTS = 1e-5  # their grouped kernel adds up in float32, in an order of its own on some CPUs
NAMES = ("math", "code", "prose")


def directions_of(scoring: ScoringModel, parameters: str) -> dict[str, dict[str, torch.Tensor]]:
    """A random direction for each target, and for the drift."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: parameter.shape for name, parameter in scored_parameters(scoring.model, parameters).items()}
    return {
        target: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for target in (*NAMES, "drift")
    }


def estimator_of(kind: str, scoring: ScoringModel, parameters: str, direction, drift=None):
    if kind == "value_propagation":
        return ValuePropagation(scoring, parameters, direction, drift)
    return Exact(scoring, parameters, direction, drift, kind)


def assert_the_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(found, expected) < SAME


@pytest.mark.parametrize("parameters", ["last-layers:2", "all-linear", "all"])
@pytest.mark.parametrize("kind", ["forward", "central", "value_propagation"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_each_target_is_as_if_it_were_alone(architecture, kind, parameters):
    if (kind, parameters) == ("value_propagation", "all"):
        return
    scoring = prepare_model(tiny_model(architecture))
    found = directions_of(scoring, parameters)
    drift, batch = found.pop("drift"), make_batch(*random_rows(seed=5, count=3, longest=20))
    together = estimator_of(kind, scoring, parameters, Targets(found), drift)(batch)
    for name, direction in found.items():
        alone = estimator_of(kind, scoring, parameters, direction, drift)(batch)
        assert_the_same(together.terms[f"adaptation.{name}"], alone.adaptation)
        assert_the_same(together.stability, alone.stability)
    torch.testing.assert_close(together.adaptation, sum(together.terms[f"adaptation.{name}"] for name in NAMES))


def passes(monkeypatch, scoring: ScoringModel, parameters: str, kind: str, direction) -> dict[str, int]:
    """How often a batch goes through the first layer, the last layer, the head and backwards."""
    estimator = estimator_of(kind, scoring, parameters, direction)
    counts = {"first": 0, "last": 0, "head": 0, "backward": 0}

    def count(name: str) -> None:
        counts[name] += 1

    layers, head, grad = decoder_layers(scoring.model), type(scoring.head), torch.autograd.grad
    for name, layer in (("first", layers[0]), ("last", layers[-1])):
        layer.mlp.register_forward_hook(lambda *_, name=name: count(name))
    plain = head.__call__
    with monkeypatch.context() as patch:
        patch.setattr(head, "__call__", lambda *args, **kwargs: (count("head"), plain(*args, **kwargs))[1])
        patch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (count("backward"), grad(*args, **kwargs))[1])
        estimator(make_batch(*random_rows(seed=5, count=3, longest=20)))
    return counts


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Two passes and two heads for each target; the layers below are run once
        ("central", {"first": 1, "last": 6, "head": 6, "backward": 0}),
        # With a tangent for each target in it
        ("forward", {"first": 1, "last": 1, "head": 1, "backward": 0}),
        ("value_propagation", {"first": 1, "last": 1, "head": 1, "backward": 1}),
    ],
)
def test_passes_are_shared(kind, expected, monkeypatch):
    scoring = prepare_model(tiny_model("llama"))
    found = directions_of(scoring, "last-layers:2")
    del found["drift"]
    assert passes(monkeypatch, scoring, "last-layers:2", kind, Targets(found)) == expected


def test_one_target_without_a_name_takes_the_passes_it_took(monkeypatch):
    scoring = prepare_model(tiny_model("llama"))
    monkeypatch.setattr("alphatoken.exact.HiddenTangents", None)  # would fail if it were used
    direction = directions_of(scoring, "all-linear")["math"]
    counts = passes(monkeypatch, scoring, "all-linear", "forward", direction)
    assert counts == {"first": 1, "last": 1, "head": 1, "backward": 0}


@pytest.mark.parametrize("shared", [True, False])
def test_where_a_pass_cannot_be_shared_each_target_takes_its_own(shared, monkeypatch):
    """Experts, which choose by the data, can share it."""
    scoring = prepare_model(tiny_model("mixtral"))
    if not shared:

        def refuse(*_, **__):
            raise RuntimeError("vmap: this operation is not known")

        monkeypatch.setattr(hidden_tangent, "vmap", lambda *_, **__: refuse)
    found = directions_of(scoring, "last-layers:2")
    del found["drift"]
    batch = make_batch(*random_rows(seed=6, count=2, longest=16))
    estimator = Exact(scoring, "last-layers:2", Targets(found), method="forward")
    for _ in range(2):
        together = estimator(batch)
        for name, direction in found.items():
            alone = Exact(scoring, "last-layers:2", direction, method="forward")(batch)
            assert relative_error(together.terms[f"adaptation.{name}"], alone.adaptation) < SAME_OF_EXPERTS
        assert estimator.shared.possible == shared


def test_other_errors_are_not_taken_for_a_missing_rule():
    scoring = prepare_model(tiny_model("llama"))
    estimator = Exact(scoring, "all-linear", Targets(directions_of(scoring, "all-linear")), method="forward")
    with pytest.raises(IndexError):
        estimator(make_batch([[1, 2, 10**6]], [[False, True, True]]))
    assert estimator.shared.possible
    scoring = prepare_model(tiny_model("bloom"))
    estimator = Exact(scoring, "all-linear", Targets(directions_of(scoring, "all-linear")), method="forward")
    with pytest.raises(UserError, match="BloomGelu"):
        estimator(make_batch(*random_rows(0, 1)))


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    parameters = {name: (id(parameter), parameter.clone()) for name, parameter in model.named_parameters()}
    scoring = prepare_model(model)
    Exact(scoring, "last-layers:2", Targets(directions_of(scoring, "last-layers:2")), method="forward")(
        make_batch(*random_rows(0, 2))
    )
    after = dict(model.named_parameters())
    assert all(
        id(after[name]) == which and torch.equal(after[name], tensor) for name, (which, tensor) in parameters.items()
    )
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_rows_and_pairs_have_a_column_for_each_target():
    scoring = prepare_model(tiny_model("llama"))
    found = directions_of(scoring, "last-layers:2")
    del found["drift"]
    estimators = {name: ValuePropagation(scoring, "last-layers:2", direction) for name, direction in found.items()}
    together = ValuePropagation(scoring, "last-layers:2", Targets(found))

    ids, masks = random_rows(seed=1, count=4)
    rows = pa.table(
        {"row_id": range(4), "id": list("abcd"), "input_ids": ids, "response_mask": masks, "truncated": [False] * 4}
    )
    table, failures, _ = score_table(rows, together, 64, CPU, terms=True, targets=NAMES)
    assert not failures
    for name, estimator in estimators.items():
        alone, _, _ = score_table(rows, estimator, 64, CPU)
        for own in ("adaptation", "mean_adaptation"):
            assert_columns_agree(table[f"{own}.{name}"], alone[own])
    assert_columns_agree(table["adaptation"], sum(flat_numbers(table[f"adaptation.{name}"]) for name in NAMES))
    parts = [flat_numbers(table[f"adaptation_{path}"]) for path in ("direct", "causal")]
    assert_columns_agree(table["adaptation"], sum(parts))

    pairs = encoded_pairs(random_pairs(seed=2, count=4))
    table, failures, _ = score_pair_table(pairs, PairEstimator(together, scoring, None), 64, CPU, 0.1, targets=NAMES)
    assert not failures
    for name, estimator in estimators.items():
        alone, _, _ = score_pair_table(pairs, PairEstimator(estimator, scoring, None), 64, CPU, 0.1)
        for own in ("chosen_adaptation", "rejected_adaptation", "mean_adaptation"):
            assert_columns_agree(table[f"{own}.{name}"], alone[own])


def flat_numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([np.atleast_1d(np.array(item, dtype=np.float64)) for item in column.to_pylist()])


def assert_columns_agree(found, expected) -> None:
    found, expected = (x if isinstance(x, np.ndarray) else flat_numbers(x) for x in (found, expected))
    assert np.abs(found - expected).max() < SAME * np.abs(expected).max()


# masks


def with_targets(table: pa.Table) -> pa.Table:
    """A scored table whose adaptation is that of two targets."""
    random = np.random.default_rng(1)
    for prefix in ("", "mean_"):
        whole = table[f"{prefix}adaptation"].to_pylist()
        part = [(random.normal(size=np.shape(x)) * (np.array(x) != 0)).astype(np.float32) for x in whole]
        rest = [(np.float32(x) - y).astype(np.float32) for x, y in zip(whole, part, strict=True)]
        kind = table.schema.field(f"{prefix}adaptation").type
        table = table.append_column(f"{prefix}adaptation.math", pa.array(part, kind))
        table = table.append_column(f"{prefix}adaptation.code", pa.array(rest, kind))
    return table


def test_weights_make_another_sum():
    table = with_targets(scored_table(np.random.default_rng(0), first_row_id=0, num_rows=12))
    assert masking.combined(table, {}) is table
    found = masking.combined(table.slice(3, 6), {"math": 2.0, "code": -0.5})
    for row, before in zip(found.to_pylist(), table.slice(3, 6).to_pylist(), strict=True):
        for name in ("adaptation", "mean_adaptation"):
            expected = 2 * np.array(before[f"{name}.math"]) - 0.5 * np.array(before[f"{name}.code"])
            np.testing.assert_allclose(row[name], expected, rtol=1e-5, atol=1e-6)
        assert {k: v for k, v in row.items() if k not in ("adaptation", "mean_adaptation")} == {
            k: v for k, v in before.items() if k not in ("adaptation", "mean_adaptation")
        }
    assert found.schema == table.schema
    assert masking.combined(table.slice(0, 0), {"math": 1.0}).num_rows == 0


def test_a_mask_of_one_target_is_that_of_its_column():
    table = with_targets(scored_table(np.random.default_rng(0), first_row_id=0, num_rows=12))
    plan = MaskPlan(0.5, 0.0)
    own = {"adaptation": "adaptation.math", "mean_adaptation": "mean_adaptation.math"}
    alone = table.select([own.get(name, name) for name in scored_table(np.random.default_rng(0), 0, 1).column_names])
    expected = mask_table(alone.rename_columns(scored_table(np.random.default_rng(0), 0, 1).column_names), plan, "s")
    found = mask_table(masking.combined(table, {"math": 1.0, "code": 0.0}), plan, "s")
    assert found.data["labels"].equals(expected.data["labels"])
    assert found.data["labels"] != mask_table(table, plan, "s").data["labels"]


def test_weights_of_targets():
    assert weights_of(["math", "code"], {}, "runs/scored") == {}
    assert weights_of(["math", "code"], {"code": 0.5}, "runs/scored") == {"math": 1.0, "code": 0.5}
    with pytest.raises(UserError, match="runs/scored has no such target; it has math, code"):
        weights_of(["math", "code"], {"cod": 0.5}, "runs/scored")
    with pytest.raises(UserError, match="one target without a name"):
        weights_of([], {"math": 0.5}, "runs/scored")
    with pytest.raises(UserError, match="weight zero"):
        weights_of(["math"], {"math": 0.0}, "runs/scored")
    for given in ({"math": "1,code=0.5"}, {"math": "1", "code": "0.5"}, {"math": 1, "code": 0.5}):
        found = MaskConfig(input="a", output="b", target_weights=given).target_weights
        assert found == {"math": 1.0, "code": 0.5}
    for wrong in ({"math": "1,code"}, {"math": "many"}, {"math": "inf"}):
        with pytest.raises(ValidationError):
            MaskConfig(input="a", output="b", target_weights=wrong)


# names


def test_names_of_files():
    assert files_by_target([]) == {}
    assert files_by_target(["a.jsonl", "b.jsonl"]) == {"": ["a.jsonl", "b.jsonl"]}
    given = ["math=a.jsonl", "code=s3://b/c=1/*.parquet", "math=d.jsonl"]
    assert files_by_target(given) == {"math": ["a.jsonl", "d.jsonl"], "code": ["s3://b/c=1/*.parquet"]}
    assert target_names(given) == ["math", "code"] and target_names(["a.jsonl"]) == []
    assert validation_files(given) == ["a.jsonl", "d.jsonl", "s3://b/c=1/*.parquet"]
    for path in ("data/lang=en/a.jsonl", "./lang=en.jsonl", "s3://bucket/day=1/a.jsonl", "/day=1/a.jsonl"):
        assert files_by_target([path]) == {"": [path]}


def test_what_stages_say_of_names():
    scored = {"model": "m", "data": ["d.jsonl"], "output": "o"}
    assert ScoreConfig(**scored, validation=["a=x.jsonl", "b=y.jsonl"]).validation == ["a=x.jsonl", "b=y.jsonl"]
    for config_class in (ScoreConfig, DirectionConfig):
        settings = scored if config_class is ScoreConfig else {"model": "m", "output": "o"}
        with pytest.raises(ValidationError, match=r"y\.jsonl has no target's name"):
            config_class(**settings, validation=["a=x.jsonl", "y.jsonl"])
    with pytest.raises(ValidationError, match="rounds know one target"):
        RoundsConfig(**scored, validation=["a=x.jsonl"])
    with pytest.raises(ValidationError, match="--in-run knows one target"):
        TrainConfig(**scored, in_run=True, validation=["a=x.jsonl"])
