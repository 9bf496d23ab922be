"""Intervals, ranks and detection figures. Pure numpy."""

import math
from collections.abc import Callable, Sequence

import numpy as np

# two-sided 95% points of Student's t by degrees of freedom
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def mean_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of the 95% t interval); NaN width for a single value."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), math.nan
    t = T95.get(len(array) - 1, 1.96)
    return float(array.mean()), float(t * array.std(ddof=1) / math.sqrt(len(array)))


def paired(results: dict[int, float], control: dict[int, float]) -> list[float]:
    """Differences result - control over the seeds that both have, in the order of the seeds."""
    return [results[seed] - control[seed] for seed in sorted(results.keys() & control.keys())]


def gap_closed(rule: float, full: float, oracle: float) -> float:
    """Share of the distance from full SFT to the oracle that a rule covers; NaN where there is no distance."""
    return (full - rule) / (full - oracle) if full > oracle else math.nan


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 to 1, equal values with their mean rank."""
    values = np.asarray(values)
    order = np.argsort(values, kind="stable")
    _, first, inverse, counts = np.unique(values[order], return_index=True, return_inverse=True, return_counts=True)
    found = np.empty(len(values))
    found[order] = (first + (counts - 1) / 2)[inverse]
    return found / max(1, len(values) - 1)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative; NaN without both."""
    positive = np.asarray(positive, dtype=bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return math.nan
    rank = ranks(scores) * max(1, len(positive) - 1) + 1
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * m))


def precision_recall(dropped: np.ndarray, noise: np.ndarray) -> tuple[float, float]:
    """(share of the dropped that is noise, share of the noise that is dropped); NaN where nothing is there."""
    hits = int((dropped & noise).sum())
    return _ratio(hits, int(dropped.sum())), _ratio(hits, int(noise.sum()))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def first_crossing(x: Sequence[float], y: Sequence[float], level: float) -> float:
    """y where x first falls to `level`, linear between the points; NaN where it never does."""
    if x[0] <= level:
        return float(y[0])
    for (x0, y0), (x1, y1) in zip(zip(x, y, strict=True), zip(x[1:], y[1:], strict=True), strict=False):
        if x1 <= level:
            return float(y0 + (y1 - y0) * (x0 - level) / (x0 - x1))
    return math.nan


def rank_correlation(points: np.ndarray) -> float:
    """Spearman's, of the two columns of P x 2 points; NaN where a column does not vary."""
    columns = [ranks(points[:, i]) for i in range(2)]
    if len(points) < 3 or any(column.std() == 0 for column in columns):
        return math.nan
    return float(np.corrcoef(*columns)[0, 1])


def bootstrap_interval(
    groups: list[np.ndarray], statistic: Callable[[np.ndarray], float], draws: int = 1000
) -> tuple[float, float]:
    """95% interval of a statistic of all points together, whole groups drawn anew; NaN for a single group.

    Points of one group depend on one another: windows of a run.
    """
    if len(groups) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    found = [statistic(np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]))
             for _ in range(draws)]  # fmt: skip
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)
