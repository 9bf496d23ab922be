"""Suspect tokens and rows: what validation rows, which are good, do not look like. In numpy.

    a token is surprising   its loss is above the bound of its class
    a token is suspect      it is surprising, and its value is below zero: training on it raises the validation loss
    a row is suspect        its mean loss is above m + w s; m, s: mean and standard deviation of validation rows' means

Neither sign is enough alone: a surprising token may be what is to be learned, and many good tokens have a negative
value at some checkpoint.

A class has a bound only where losses are in excess. Validation tokens say how many tokens of a class should lie above a
loss; where at least twice as many of those to be judged do, half of them or more are not like validation tokens (the
tail form of Efron's local false discovery rate), and the lowest such loss is the bound. So nothing is dropped of data
that look like the validation rows, whatever their losses: with a plain quantile as bound, a tenth of clean data would
be surprising. Bounds and values belong to one checkpoint.

N response tokens, flat; R rows, row r at offsets[r]:offsets[r + 1]; C token classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alphatoken.baselines import forward_losses
from alphatoken.batching import Batch
from alphatoken.model import ScoringModel
from alphatoken.token_classes import TOKEN_CLASS_NAMES

FEWEST_TOKENS = 30  # of a class, known and to be judged, below which its tokens are never surprising
QUANTILES = (0.9, 0.95, 0.975, 0.99)  # of validation losses: what a bound may be
LEAST_EXCESS = 0.5  # share of the tokens above a bound that are not like validation tokens, as estimated
ROW_WIDTH = 3.0
FEW_ROWS = 12  # of validation: below, masks hurt in trials (docs/results/README.md)
FEW_ROWS_WARNING = (
    "only %d validation rows: in trial runs masks from 6 rows hurt as often as they helped, from 12 rows they helped "
    "in five of six, from 24 in all; give at least 12, better 24 (docs/results/README.md)"
)


@dataclass(frozen=True)
class TokenLosses:
    """Response tokens of rows at some weights."""

    losses: np.ndarray  # N
    classes: np.ndarray  # N int
    lengths: np.ndarray  # R: response tokens of each row

    @property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @staticmethod
    def joined(parts: Sequence["TokenLosses"]) -> "TokenLosses":
        columns = ([getattr(part, name) for part in parts] for name in ("losses", "classes", "lengths"))
        return TokenLosses(*map(np.concatenate, columns))


@dataclass(frozen=True)
class Bounds:
    """How large a loss may be at some weights: of a token by its class, and of a row on average."""

    tokens: np.ndarray  # C
    row: float

    @classmethod
    def of(cls, validation: TokenLosses, judged: TokenLosses) -> "Bounds":
        """judged: everything that is judged together, such as a window or an optimizer step."""
        profile = LossProfile.of(validation)
        return profile.bounds(counts_above(judged, profile.candidates))

    def to_json(self, names: Sequence[str]) -> dict:
        """By name of the class; without a bound: null."""
        row, *tokens = (float(x) if np.isfinite(x) else None for x in (self.row, *self.tokens))
        return {"row": row, "tokens": dict(zip(names, tokens, strict=True))}

    def without(self, numbers: np.ndarray) -> "Bounds":
        """The same, but tokens of some classes have no bound."""
        tokens = self.tokens.copy()
        tokens[numbers] = np.inf
        return Bounds(tokens, self.row)

    def keep(self, found: TokenLosses, values: np.ndarray | None = None) -> np.ndarray:
        """True (N,) for tokens that are not suspect, of rows that are not. Without values: not surprising."""
        if values is None:
            dropped = surprising_tokens(found.losses, found.classes, self.tokens)
        else:
            dropped = suspect_tokens(found.losses, values, found.classes, self.tokens)
        return ~dropped & ~np.repeat(suspect_rows(found.losses, found.offsets, self.row), found.lengths)


@dataclass(frozen=True)
class LossProfile:
    """What bounds need to know of the validation rows: small, whatever their number."""

    candidates: np.ndarray  # (C, Q), see candidate_bounds
    counts: np.ndarray  # (C, 1 + Q), see counts_above
    row: float  # bound of a row's mean loss
    num_rows: int

    @classmethod
    def of(cls, validation: TokenLosses) -> "LossProfile":
        candidates = candidate_bounds(validation)
        row = row_loss_bound(validation.losses, validation.offsets, ROW_WIDTH)
        return cls(candidates, counts_above(validation, candidates), row, len(validation.lengths))

    def bounds(self, judged: np.ndarray) -> Bounds:
        """judged: `counts_above` of everything that is judged together."""
        return Bounds(bounds_from_counts(self.candidates, self.counts, judged), self.row)

    def to_json(self) -> dict:
        """By name of the class; classes without validation tokens are left out."""
        classes = {
            name: {"tokens": int(counts[0]), "bounds": candidates.tolist(), "above": counts[1:].tolist()}
            for name, candidates, counts in zip(TOKEN_CLASS_NAMES, self.candidates, self.counts, strict=True)
            if counts[0]
        }
        return {"rows": self.num_rows, "classes": classes, "row": self.row if np.isfinite(self.row) else None}

    @classmethod
    def from_json(cls, found: dict, names: Sequence[str]) -> "LossProfile":
        """names: of the token classes as they are numbered where the profile is used."""
        candidates = np.full((len(names), len(QUANTILES)), np.nan)
        counts = np.zeros((len(names), 1 + len(QUANTILES)), dtype=np.int64)
        for number, name in enumerate(names):
            if known := found["classes"].get(name):
                candidates[number], counts[number] = known["bounds"], [known["tokens"], *known["above"]]
        return cls(candidates, counts, np.inf if found["row"] is None else found["row"], found["rows"])


def token_losses(batch: Batch, losses: torch.Tensor, class_of: torch.Tensor) -> TokenLosses:
    """What bounds are about, of a batch. losses N; class_of V: class of each token id, on the CPU."""
    lengths = batch.response_mask[:, 1:].sum(1)
    lengths = lengths[lengths > 0]  # what fills a batch up has no response
    classes = class_of[batch.targets.cpu()]
    return TokenLosses(losses.double().cpu().numpy(), classes.numpy(), lengths.cpu().numpy())


def validation_losses(scoring: ScoringModel, batches: Iterable[Batch], class_of: torch.Tensor) -> TokenLosses:
    """Losses of validation rows at the current weights: a forward pass."""
    found = [token_losses(batch, forward_losses(scoring, batch).losses, class_of) for batch in batches]
    return TokenLosses.joined(found)


def loss_bounds(
    validation: TokenLosses, judged: TokenLosses, least: float | None = None, num_classes: int = len(TOKEN_CLASS_NAMES)
) -> np.ndarray:
    """float64 (C,): the bound of each class; infinity where nothing is in excess. least: default LEAST_EXCESS.

    Losses that are not finite count for nothing.
    """
    candidates = candidate_bounds(validation, num_classes)
    known, others = counts_above(validation, candidates), counts_above(judged, candidates)
    return bounds_from_counts(candidates, known, others, least)


def candidate_bounds(validation: TokenLosses, num_classes: int = len(TOKEN_CLASS_NAMES)) -> np.ndarray:
    """float64 (C, Q): what the bound of each class may be, ascending; NaN without validation tokens of the class."""
    found = np.full((num_classes, len(QUANTILES)), np.nan)
    finite = np.isfinite(validation.losses)
    for number in range(num_classes):
        known = validation.losses[(validation.classes == number) & finite]
        if len(known):
            found[number] = np.quantile(known, QUANTILES)
    return found


def counts_above(found: TokenLosses, candidates: np.ndarray) -> np.ndarray:
    """int64 (C, 1 + Q): finite losses of each class, then those above each candidate. Counts of parts add up."""
    counts = np.zeros((candidates.shape[0], candidates.shape[1] + 1), dtype=np.int64)
    finite = np.isfinite(found.losses)
    for number, bounds in enumerate(candidates):
        losses = found.losses[(found.classes == number) & finite]
        counts[number] = [len(losses), *((losses > bound).sum() for bound in bounds)]
    return counts


def bounds_from_counts(
    candidates: np.ndarray, validation: np.ndarray, judged: np.ndarray, least: float | None = None
) -> np.ndarray:
    """float64 (C,): the lowest candidate above which losses are in excess; infinity where there is none.

    k of n validation tokens lie above a loss: the expected share is (k + 1 + sqrt(k + 1)) / n, a standard deviation
    above k / n, so that chance seldom makes an excess. validation, judged: of `counts_above`. least: default
    LEAST_EXCESS.
    """
    least = LEAST_EXCESS if least is None else least
    bounds = np.full(len(candidates), np.inf)
    above = validation[:, 1:] + 1
    for number in range(len(candidates)):
        known, others = validation[number, 0], judged[number, 0]
        if min(known, others) < FEWEST_TOKENS:
            continue
        expected = (above[number] + np.sqrt(above[number])) / known
        in_excess = judged[number, 1:] / others * (1 - least) >= expected
        if in_excess.any():
            bounds[number] = candidates[number, in_excess.argmax()]
    return bounds


def row_loss_bound(losses: np.ndarray, offsets: np.ndarray, width: float = ROW_WIDTH) -> float:
    """m + w s of the validation rows; infinity from fewer than two rows."""
    means = row_means(losses, offsets)
    return float(means.mean() + width * means.std(ddof=1)) if len(means) > 1 else float("inf")


def surprising_tokens(losses: np.ndarray, classes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """True (N,) where a loss is above the bound of its class; a class below zero, of no known one, has none."""
    return losses > np.append(bounds, np.inf)[classes]


def suspect_tokens(losses: np.ndarray, values: np.ndarray, classes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """True (N,): surprising and of negative value."""
    return surprising_tokens(losses, classes, bounds) & (values < 0)


def suspect_rows(losses: np.ndarray, offsets: np.ndarray, bound: float) -> np.ndarray:
    """True (R,) where a row's mean loss is above the bound."""
    return row_means(losses, offsets) > bound


def row_means(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """float64 (R,); NaN for a row without a response token."""
    lengths = np.diff(offsets)
    filled = lengths > 0
    means = np.full(len(lengths), np.nan)
    means[filled] = np.add.reduceat(values.astype(np.float64), offsets[:-1][filled]) / lengths[filled]
    return means
