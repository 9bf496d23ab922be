"""From values to weights of a window's tokens: every rule of the study as a pure function of numpy arrays.

N response tokens of R rows, flat, row r at offsets[r]:offsets[r + 1]. Thresholds are the library's.
"""

from dataclasses import dataclass

import numpy as np
import torch

from alphatoken.selection import keep_tokens, row_thresholds, soft_weights
from alphatoken.suspects import (
    FEWEST_TOKENS,
    TokenLosses,
    loss_bounds,
    row_loss_bound,
    row_means,
    surprising_tokens,
    suspect_rows,
    suspect_tokens,
)
from benchmarks.evidence.data import Row
from benchmarks.evidence.signals import Signal, Values
from benchmarks.evidence.stats import ranks

FOLDS = 4  # of the validation rows, for typical rows


@dataclass(frozen=True)
class Rule:
    """One rule and its schedule.

    choose   all: everything is kept; oracle: exactly the noise is dropped
             tokens: the lowest values of the window (or sequence, or class) are dropped
             rows: whole rows with the lowest score, a mix of the ranks of mean value and mean loss
             typical: rows that validation rows do not look like are dropped (mean loss too high or mean value too
             low), and in the others tokens that are surprising and harmful (loss too high and value below zero)
    """

    name: str
    choose: str = "all"
    signal: Signal | None = None
    keep: float = 0.8
    min_value: float | None = None
    scope: str = "window"  # window | sequence | class
    protect: tuple[str, ...] = ()
    center: bool = False  # subtract each token class's mean value first
    soft: bool = False
    negate: bool = False  # drop the highest values
    loss_share: float = 0.0  # rows: share of the loss in the score
    loss_width: float | None = None  # typical: standard deviations of validation rows above their mean
    value_width: float | None = None  # typical: robust standard deviations below the median mean value
    token_quantile: float | None = None  # suspects: loss above this quantile of validation tokens of the class
    excess: float | None = None  # suspects: instead of a quantile, where at least this share is in excess
    suspect_value: float | None = 0.0  # and value below this; None: whatever the value
    warmup: int = 12
    refresh: int = 12
    steps: int = 48
    with_validation: bool = False  # validation rows are training rows too
    in_run: bool = False  # tokens are judged in the step that trains on them; `refresh` is of direction and bounds
    shared: bool | None = None  # in-run: values from the training forward pass
    known_rows: int | None = None  # validation rows that the rule may use; None: all
    token_keep: float | None = None  # rows: of the tokens of the rows that stay, this share stays
    checkpoints: tuple[int, ...] | None = None  # values are means over these steps of a plain run made before

    @property
    def is_calibrated(self) -> bool:
        return any(x is not None for x in (self.loss_width, self.value_width, self.token_quantile, self.excess))


@dataclass(frozen=True)
class Window:
    """What a rule may look at."""

    values: Values
    classes: np.ndarray  # N int, token class numbers
    held_out: Values | None = None  # validation rows, each valued without itself
    held_out_classes: np.ndarray | None = None
    class_names: tuple[str, ...] = ()


def weights_of(rule: Rule, window: Window) -> np.ndarray:
    """float32 N: the weight of every response token; 0 where dropped."""
    values = window.values
    keep = np.ones(len(values.value), dtype=bool)
    if rule.choose == "tokens":
        return _token_weights(rule, window)
    if rule.choose == "rows":
        keep &= np.repeat(_best_rows(rule, values), np.diff(values.offsets))
        if rule.token_keep is not None:
            keep[keep] = _highest(values.value[keep], rule.token_keep)
    if rule.choose == "typical":
        keep &= np.repeat(typical_rows(rule, values, window.held_out), np.diff(values.offsets))
        if rule.token_quantile is not None or rule.excess is not None:
            keep &= ~suspects(rule, window)
    return keep.astype(np.float32)


def _token_weights(rule: Rule, window: Window) -> np.ndarray:
    values, offsets = window.values.value.astype(np.float32), window.values.offsets
    if rule.negate:
        values = -values
    if rule.center:
        for number in np.unique(window.classes):
            values[window.classes == number] -= values[window.classes == number].mean()
    if rule.scope == "class":  # rank inside the class: equal shares of every class go
        for number in np.unique(window.classes):
            values[window.classes == number] = ranks(values[window.classes == number])
    protected = None
    if rule.protect:
        protected = np.isin(window.classes, [window.class_names.index(name) for name in rule.protect])
    threshold = None
    if rule.scope != "sequence":
        open_values = values if protected is None else values[~protected]
        threshold = float(row_thresholds(open_values, np.array([0, len(open_values)]), rule.keep)[0])
    keep = keep_tokens(values, offsets, rule.keep, protected, threshold, rule.min_value)
    if rule.soft:
        return soft_weights(values, keep, offsets)
    return keep.astype(np.float32)


def _highest(values: np.ndarray, share: float) -> np.ndarray:
    """bool, one a value: the highest `share` of them."""
    values = values.astype(np.float32)
    return values >= row_thresholds(values, np.array([0, len(values)]), share)[0]


def _best_rows(rule: Rule, values: Values) -> np.ndarray:
    """R bool: the rows with the best score."""
    score = (1 - rule.loss_share) * ranks(row_means(values.value, values.offsets))
    score -= rule.loss_share * ranks(row_means(values.loss, values.offsets))
    return _highest(score, rule.keep)


def typical_rows(rule: Rule, values: Values, held_out: Values) -> np.ndarray:
    """R bool: rows whose mean loss and mean value could be those of a validation row."""
    keep = np.ones(len(values.offsets) - 1, dtype=bool)
    if rule.loss_width is not None:
        bound = row_loss_bound(held_out.loss, held_out.offsets, rule.loss_width)
        keep &= ~suspect_rows(values.loss, values.offsets, bound)
    if rule.value_width is not None:
        known = row_means(held_out.value, held_out.offsets)
        middle = np.median(known)  # one odd validation row must not move the bound: median and absolute deviation
        spread = 1.4826 * np.median(np.abs(known - middle))
        keep &= row_means(values.value, values.offsets) >= middle - rule.value_width * spread
    return keep


def suspects(rule: Rule, window: Window) -> np.ndarray:
    """N bool: tokens that are surprising and, unless the rule does not look at values, harmful."""
    number = int(window.held_out_classes.max()) + 1
    if rule.excess is None:
        bounds = quantile_bounds(window.held_out.loss, window.held_out_classes, number, rule.token_quantile)
    else:
        known = _token_losses(window.held_out, window.held_out_classes)
        bounds = loss_bounds(known, _token_losses(window.values, window.classes), rule.excess, number)
    bounds = np.append(bounds, np.inf)  # classes that no validation token has
    classes = np.minimum(window.classes, number)
    if rule.suspect_value is None:
        return surprising_tokens(window.values.loss, classes, bounds)
    return suspect_tokens(window.values.loss, window.values.value - rule.suspect_value, classes, bounds)


def _token_losses(values: Values, classes: np.ndarray) -> TokenLosses:
    return TokenLosses(values.loss, classes, np.diff(values.offsets))


def quantile_bounds(losses: np.ndarray, classes: np.ndarray, num_classes: int, quantile: float) -> np.ndarray:
    """float64 (C,): the quantile of validation losses by token class, whether anything is in excess or not; infinity
    where too few tokens are known.
    """
    bounds = np.full(num_classes, np.inf)
    for number in range(num_classes):
        known = losses[classes == number]
        if len(known) >= FEWEST_TOKENS:
            bounds[number] = np.quantile(known, quantile)
    return bounds


def held_out_order(validation: list[Row]) -> list[Row]:
    """The order in which Scorer.calibrated returns the validation rows."""
    return [row for fold in range(FOLDS) for row in validation[fold::FOLDS]]


def weight_of(row: Row, weights: dict[int, np.ndarray]) -> torch.Tensor:
    found = weights.get(row.row_id)
    return torch.ones(sum(row.response_mask)) if found is None else torch.from_numpy(found)
