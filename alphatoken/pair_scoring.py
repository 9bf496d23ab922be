"""A table of encoded pairs to a table of scored pairs (Eq. 14).

    s = beta * ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)), over whole responses
    omega = beta * sigmoid(-s), held constant
    value of a chosen token = +omega * its SFT value, of a rejected token = -omega * its SFT value

delta is linear in a row's losses, so both estimators score each branch as an ordinary row, and the factor comes after:
a rejected token is valuable when pushing it *down* helps. Controls (loss, entropy, excess_loss, random) rank tokens by
a signal, not by a gradient, and stay as they are.

R pairs, N response tokens of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from alphatoken import schema
from alphatoken.baselines import Baseline, forward_losses
from alphatoken.batching import Batch
from alphatoken.exact import Exact
from alphatoken.losses import dpo_omega
from alphatoken.model import ScoringModel
from alphatoken.schema import BRANCHES
from alphatoken.scoring import NOT_FINITE, ScoredColumns, list_column, lists, score_columns
from alphatoken.targets import target_columns
from alphatoken.values import Estimator, TokenValues

REFERENCE = "ref_logprobs"
VALUES = ("adaptation", "stability")


class PairEstimator:
    """An estimator whose log-probabilities are those of a plain forward pass, with the reference's beside them."""

    def __init__(self, estimator: Estimator, policy: ScoringModel, reference: ScoringModel | None) -> None:
        """reference: None where it is the policy itself, which needs no pass of its own."""
        self.estimator, self.policy, self.reference = estimator, policy, reference
        self.signed = not isinstance(estimator, Baseline)
        # A central difference knows the losses on both sides of the weights only: not precise enough for sums.
        self._plain_pass = isinstance(estimator, Exact) and estimator.method == "central"

    def __call__(self, batch: Batch) -> TokenValues:
        values = self.estimator(batch)
        logprobs = -forward_losses(self.policy, batch).losses if self._plain_pass else values.logprobs
        reference = logprobs if self.reference is None else -forward_losses(self.reference, batch).losses
        return replace(values, logprobs=logprobs, terms=values.terms | {REFERENCE: reference})


@dataclass(frozen=True)
class PairWeights:
    """What whole responses say: (R,) float64 each."""

    ref_chosen: np.ndarray
    ref_rejected: np.ndarray
    omega: np.ndarray


def pair_weights(logps: dict[str, np.ndarray], ref_logps: dict[str, np.ndarray], beta: float) -> PairWeights:
    """omega from log-probabilities of whole responses: (R,) each, by branch."""
    chosen, rejected = (torch.from_numpy(logps[branch] - ref_logps[branch]) for branch in BRANCHES)
    return PairWeights(ref_logps["chosen"], ref_logps["rejected"], dpo_omega(chosen, rejected, beta).numpy())


def score_pair_table(
    table: pa.Table,
    estimator: PairEstimator,
    batch_tokens: int,
    device: torch.device,
    beta: float,
    terms: bool = False,
    targets: Sequence[str] = (),
) -> tuple[pa.Table, dict[int, str], int]:
    """An ENCODED_PAIRS table (other columns are carried along) to SCORED_PAIRS columns, and those of named targets.

    Returns (table, {row index: reason} of pairs to quarantine, computed positions with padding). A pair fails with
    either of its branches. Raises as `score_columns` does.
    """
    prompts = lists(table["prompt_ids"])
    responses = {branch: lists(table[f"{branch}_ids"]) for branch in BRANCHES}
    own = target_columns(targets)
    more = (*(schema.TERMS if terms else ()), *own, REFERENCE)
    scored = _score_branches(prompts, responses, table["row_id"].to_pylist(), estimator, batch_tokens, device, more)
    pairs = len(prompts)
    lengths = {branch: np.array([len(row) for row in responses[branch]], dtype=np.int64) for branch in BRANCHES}
    columns = _split(scored.flat, prompts, responses)
    sums = {
        name: {branch: _row_sums(columns[branch][name], lengths[branch]) for branch in BRANCHES}
        for name in ("logprobs", REFERENCE)
    }
    weights = pair_weights(sums["logprobs"], sums[REFERENCE], beta)
    valued = [name for name in scored.flat if name not in ("logprobs", REFERENCE)]
    if estimator.signed:
        for branch, sign in zip(BRANCHES, (1.0, -1.0), strict=True):
            factor = np.repeat(sign * weights.omega, lengths[branch]).astype(np.float32)
            with np.errstate(over="ignore"):  # found below
                for name in valued:
                    columns[branch][name] = columns[branch][name] * factor
    added: dict[str, pa.Array] = {
        f"{branch}_{name}": list_column(values, lengths[branch])
        for branch in BRANCHES
        for name, values in columns[branch].items()
    }
    added |= {
        "ref_chosen_logps": pa.array(weights.ref_chosen),
        "ref_rejected_logps": pa.array(weights.ref_rejected),
        "omega": pa.array(weights.omega.astype(np.float32)),
    }
    added |= _means(columns, lengths, own)
    extra = [name for name in table.column_names if name not in schema.ENCODED_PAIRS.names]
    found = [(field.name, table[field.name]) for field in schema.ENCODED_PAIRS]
    found += [(field.name, added.pop(field.name)) for field in schema.SCORED_PAIRS if field.name in added]
    found += [*added.items(), *((name, table[name]) for name in extra)]
    failures = {index: NOT_FINITE for index in _not_finite(columns, lengths)}  # omega is above 1 where beta is
    failures |= {index % pairs: reason for index, reason in scored.failures.items()}
    return pa.table(dict(found)), failures, scored.computed_positions


def _score_branches(prompts, responses, row_ids, estimator, batch_tokens, device, more) -> ScoredColumns:
    """All chosen rows, then all rejected ones, as ordinary rows of prompt and response."""
    rows = [
        np.concatenate([prompt, row])
        for branch in BRANCHES
        for prompt, row in zip(prompts, responses[branch], strict=True)
    ]
    masks = [
        np.arange(len(prompt) + len(row)) >= len(prompt)
        for branch in BRANCHES
        for prompt, row in zip(prompts, responses[branch], strict=True)
    ]
    numbers = [2 * row_id + side for side in range(len(BRANCHES)) for row_id in row_ids]  # for `random`
    owners = [*range(len(prompts))] * len(BRANCHES)
    return score_columns(rows, masks, numbers, estimator, batch_tokens, device, more=more, owners=owners)


def _split(flat: dict[str, np.ndarray], prompts, responses) -> dict[str, dict[str, np.ndarray]]:
    """Per branch the flat columns of its response tokens."""
    inside = np.concatenate(
        [
            np.repeat([False, True], [len(prompt), len(row)])
            for branch in BRANCHES
            for prompt, row in zip(prompts, responses[branch], strict=True)
        ]
        or [np.zeros(0, dtype=bool)]
    )
    chosen = sum(map(len, responses["chosen"]))
    found = {name: values[inside] for name, values in flat.items()}
    return {
        "chosen": {name: values[:chosen] for name, values in found.items()},
        "rejected": {name: values[chosen:] for name, values in found.items()},
    }


def _not_finite(columns: dict[str, dict[str, np.ndarray]], lengths: dict[str, np.ndarray]) -> list[int]:
    """Indices of pairs with a value that is not."""
    bad = np.zeros(len(lengths["chosen"]), dtype=bool)
    for branch in BRANCHES:
        owners = np.repeat(np.arange(len(bad)), lengths[branch])
        for values in columns[branch].values():
            bad[owners[~np.isfinite(values)]] = True
    return np.flatnonzero(bad).tolist()


def _row_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(R,) float64. No row is empty."""
    return np.add.reduceat(values.astype(np.float64), np.cumsum(lengths) - lengths) if len(lengths) else np.zeros(0)


def _means(
    columns: dict[str, dict[str, np.ndarray]], lengths: dict[str, np.ndarray], targets: list[str]
) -> dict[str, pa.Array]:
    """Means over the response tokens of both branches."""
    counts = lengths["chosen"] + lengths["rejected"]

    def mean(name: str) -> np.ndarray:
        return sum(_row_sums(columns[branch][name], lengths[branch]) for branch in BRANCHES) / np.maximum(counts, 1)

    found = {f"mean_{name}": mean(name) for name in (*VALUES, *targets)} | {"mean_loss": -mean("logprobs")}
    return {"num_response_tokens": pa.array(counts.astype(np.int32))} | {
        name: pa.array(values.astype(np.float32)) for name, values in found.items()
    }
