"""A table of encoded rows to a table of scored rows, and the estimator that a configuration asks for.

What becomes of rows that cannot be computed: failed_batches.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from alphatoken import direction as directions
from alphatoken import schema, tensor_file
from alphatoken.adapters import is_adapter
from alphatoken.architecture import scored_parameters
from alphatoken.baselines import Baseline
from alphatoken.batching import Batch, make_batch, plan_batches
from alphatoken.config import ScoreConfig
from alphatoken.device_copies import Fetch
from alphatoken.errors import UserError
from alphatoken.exact import Exact
from alphatoken.failed_batches import check_set_up, probe, reason_of, with_halves
from alphatoken.model import ScoringModel, fingerprint, load_model
from alphatoken.targets import target_columns
from alphatoken.value_propagation import ValuePropagation
from alphatoken.values import Estimator, Targets

NOT_FINITE = "a value or loss is not finite (NaN or infinity): the model overflows on this row"

Item = TypeVar("Item")
Computed = tuple[Batch, Fetch]  # a batch and its per-token results, one row per name


def default_parameters(estimator: str) -> str:
    """What is scored unless the user or the direction says otherwise."""
    return "last-layers:3" if estimator == "value_propagation" else "all-linear"


def build_estimator(config: ScoreConfig, scoring: ScoringModel, direction_path: str | None) -> Estimator:
    """The estimator of a score run, with its direction and drift loaded and checked against the model.

    Raises:
        UserError: a file is missing or is about another model, checkpoint or set of parameters.
    """
    if config.estimator in ("loss", "entropy", "random"):
        return Baseline(scoring, config.estimator, seed=config.seed)
    if config.estimator == "excess_loss":
        return Baseline(scoring, "excess_loss", _reference_of(config, scoring))
    assert direction_path is not None
    direction = tensor_file.load(direction_path, "direction")
    parameters = config.parameters or direction.provenance.parameters
    tensor_file.check_matches(direction.provenance, direction_path, fingerprint(scoring.model), parameters)
    check_covers(direction, direction_path, scoring, parameters)
    drift = _drift(config, scoring, parameters, direction.group("scale"))
    tangents: directions.Tensors | Targets = direction.group("direction")
    if targets := direction.provenance.targets:
        steps = {name: target["central_step"] for name, target in targets.items() if scoring.dtype == torch.float32}
        tangents = Targets(direction.groups(), steps)
    if config.estimator == "exact":
        step = direction.provenance.central_step if scoring.dtype == torch.float32 else None
        return Exact(scoring, parameters, tangents, drift, config.method, step, config.tangent_dtype)
    return ValuePropagation(scoring, parameters, tangents, drift, config.window)


def check_covers(file: tensor_file.TensorFile, path: str, scoring: ScoringModel, parameters: str) -> None:
    """Every scored weight must be in the file, in its shape."""
    for target, found in file.groups().items():
        what = tensor_file.group_of(file.provenance.kind, target)
        for name, parameter in scored_parameters(scoring.model, parameters).items():
            if name not in found or found[name].shape != parameter.shape:
                raise UserError(f"{path} has no {what} for {name} of shape {tuple(parameter.shape)}")


def check_stability(config: ScoreConfig) -> None:
    """Raises UserError for a model that has none."""
    if config.fisher and is_adapter(config.model):
        raise UserError(
            f"{config.model} is a LoRA adapter, whose base weights have not moved: for stability merge it into its "
            "base model and score that"
        )


def _drift(
    config: ScoreConfig, scoring: ScoringModel, parameters: str, scale: directions.Tensors
) -> directions.Tensors | None:
    if not config.fisher:
        return None
    check_stability(config)
    assert config.reference_model is not None
    reference = _as_stored(config.reference_model, config)
    fisher = tensor_file.load(config.fisher, "fisher")
    tensor_file.check_matches(fisher.provenance, config.fisher, fingerprint(reference), parameters)
    check_covers(fisher, config.fisher, scoring, parameters)
    there = scored_parameters(scoring.model, parameters)
    exact = scoring.dtype in (torch.float32, torch.float64)
    weights = there if exact else scored_parameters(_as_stored(config.model, config), parameters)
    drift = directions.drift(weights, scored_parameters(reference, parameters), fisher.group("fisher"))
    # A preconditioned step moves by scale * gradient, so both directions are scaled alike.
    scaled = {name: d * scale[name].to(d.device) if scale else d for name, d in drift.items()}
    return {name: tensor.to(there[name].device) for name, tensor in scaled.items()}


def _as_stored(name: str, config: ScoreConfig) -> PreTrainedModel:
    """Not rounded to the dtype that is computed in: see `directions.drift`. On the CPU, where its files are mapped."""
    return load_model(name, "stored", torch.device("cpu"), config.trust_remote_code).model


def _reference_of(config: ScoreConfig, scoring: ScoringModel) -> ScoringModel:
    assert config.reference_model is not None
    return load_model(config.reference_model, config.dtype, scoring.device, config.trust_remote_code)


@dataclass(frozen=True)
class ScoredColumns:
    """Per-token columns of a table, flat, aligned with its input_ids; and the rows that could not be valued."""

    flat: dict[str, np.ndarray]  # name -> float32 of length sum of row lengths
    failures: dict[int, str]  # row index -> reason
    computed_positions: int  # padding included


def score_columns(
    input_ids: list[np.ndarray],
    response_masks: list[np.ndarray],
    row_ids: list[int],
    estimator: Estimator,
    batch_tokens: int,
    device: torch.device,
    terms: bool = False,
    more: Sequence[str] = (),
    owners: Sequence[int] | None = None,
) -> ScoredColumns:
    """Value every response token of the given rows, in batches of rows of similar length.

    more: names in the estimator's terms that become columns too. owners: the same number for rows that are branches of
    one pair. Raises UserError, and what the estimator raises, where the failures are not the rows' own: see
    failed_batches.py.
    """
    lengths = [len(row) for row in input_ids]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    names = ["adaptation", "stability", "logprobs", *(schema.TERMS if terms else ()), *more]
    flat = {name: np.zeros(starts[-1], dtype=np.float32) for name in names}

    def compute(ids: list, masks: list, numbers: list[int]) -> Computed:
        batch = make_batch(ids, masks, numbers)
        values = estimator(batch.to(device))
        zero = torch.zeros_like(values.adaptation)
        tensors = {"adaptation": values.adaptation, "stability": values.stability, "logprobs": values.logprobs}
        return batch, Fetch(torch.stack([(tensors | values.terms).get(name, zero).float() for name in names]))

    def evaluate(indices: list[int]) -> Computed:
        return compute([input_ids[i] for i in indices], [response_masks[i] for i in indices],
                       [row_ids[i] for i in indices])  # fmt: skip

    failures: dict[int, str] = {}
    errors: dict[int, Exception] = {}
    computed = 0
    planned = plan_batches(lengths, batch_tokens)
    launched = (part for indices in planned for part in with_halves(evaluate, indices, errors))
    for indices, (batch, values) in _one_behind(launched):
        computed += batch.input_ids.numel()
        for i, part in zip(indices, batch.split(values.wait().T), strict=True):
            if not torch.isfinite(part).all():
                failures[i] = NOT_FINITE
                continue
            where = starts[i] + np.flatnonzero(response_masks[i])
            for name, found in zip(names, part.T.numpy(), strict=True):
                flat[name][where] = found
    if errors and len(errors) == len(lengths):
        shortest = min(errors, key=lambda i: lengths[i])
        check_set_up({(owners or range(len(lengths)))[i]: error for i, error in errors.items()})
        probe(lambda: compute([input_ids[shortest][:2]], [[False, True]], [row_ids[shortest]]), len(errors), device)
    failures |= {i: reason_of(error, lengths[i]) for i, error in errors.items()}
    return ScoredColumns(flat, failures, computed)


def _one_behind(launched: Iterator[Item]) -> Iterator[Item]:
    """The same items, each when the next one is there: a GPU computes that while the host writes this one down."""
    before = next(launched, None)
    for item in launched:
        assert before is not None
        yield before
        before = item
    if before is not None:
        yield before


def score_table(
    table: pa.Table,
    estimator: Estimator,
    batch_tokens: int,
    device: torch.device,
    terms: bool = False,
    targets: Sequence[str] = (),
) -> tuple[pa.Table, dict[int, str], int]:
    """An ENCODED table (other columns are carried along) to SCORED columns, and those of named targets.

    Returns (table, {row index: reason} of rows to quarantine, computed positions with padding).
    """
    ids = lists(table["input_ids"])
    masks = lists(table["response_mask"])
    own = target_columns(targets)
    scored = score_columns(ids, masks, table["row_id"].to_pylist(), estimator, batch_tokens, device, terms, own)
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    added: dict[str, pa.Array] = {name: list_column(values, lengths) for name, values in scored.flat.items()}
    added |= _row_means(scored.flat, masks, own)
    extra = [name for name in table.column_names if name not in schema.ENCODED.names]
    columns = [(f.name, table[f.name]) for f in schema.ENCODED]
    columns += [(f.name, added.pop(f.name)) for f in schema.SCORED if f.name in added]
    columns += [*added.items(), *((name, table[name]) for name in extra)]
    return pa.table(dict(columns)), scored.failures, scored.computed_positions


def _row_means(flat: dict[str, np.ndarray], masks: list[np.ndarray], targets: list[str]) -> dict[str, pa.Array]:
    """Means over response tokens. Values are zero outside the response, so sums over whole rows serve."""
    lengths = np.array([len(mask) for mask in masks], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    counts = np.array([int(mask.sum()) for mask in masks], dtype=np.int32)

    def mean(values: np.ndarray) -> pa.Array:
        sums = np.add.reduceat(values.astype(np.float64), starts) if len(starts) else np.zeros(0)
        return pa.array((sums / np.maximum(counts, 1)).astype(np.float32))

    return {
        "num_response_tokens": pa.array(counts),
        "mean_adaptation": mean(flat["adaptation"]),
        "mean_stability": mean(flat["stability"]),
        "mean_loss": mean(-flat["logprobs"]),
        **{f"mean_{name}": mean(flat[name]) for name in targets},
    }


def list_column(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Flat values to a list column with rows of these lengths."""
    return pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)), pa.array(values)
    )


def lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A list column as one numpy array per row."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=column.type)
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
