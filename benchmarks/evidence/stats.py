"""Intervals, ranks and detection figures. Pure numpy."""

import math

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
