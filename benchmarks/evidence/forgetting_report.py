"""Tables of the forgetting study, from the JSON of its finished runs."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from benchmarks.evidence.report import cost_of, difference, mean, percent, table
from benchmarks.evidence.results import Runs, by_seed
from benchmarks.evidence.stats import bootstrap_interval, first_crossing, paired, rank_correlation

FULL = "full"
PREDICTORS = {
    "values": "minus the stability of kept tokens, before the window",
    "drift": "drift times the window's move",
    "penalty": "change of the penalty",
    "distance": "change of the squared distance, without Fisher",
}


def blocks(runs: Runs) -> dict[str, str]:
    """Tables by name."""
    return {"forgetting": rules(runs), "forgetting, foretold": foretold(runs)} if runs else {}


def rules(runs: Runs) -> str:
    """Every rule after its last step, and general text at the target loss that all rules of a seed reach."""
    target, text = ({rule: last(runs, rule, key) for rule in runs} for key in ("target_loss", "text_loss"))
    at_level = at_equal_target(runs)
    rows = []
    for rule in runs:
        against = [paired(found[rule], found.get(FULL, {})) for found in (target, text, at_level)]
        target_minus_full, *text_minus_full = ("" if rule == FULL else difference(found) for found in against)
        rows.append([
            rule,
            str(len(runs[rule])),
            mean(target[rule]),
            target_minus_full,
            difference(paired(text[rule], first(runs, rule, "text_loss"))),
            *text_minus_full,
            percent(by_seed(runs[rule], "detection", "dropped")),
            mean(share_of_stability(runs[rule])),
            cost_of(runs[rule]),
        ])  # fmt: skip
    columns = [
        "rule", "seeds", "target loss", "minus full", "general text: minus the start", "minus full",
        "minus full at equal target loss", "dropped", "stability in the values", "CPU s train + score",
    ]  # fmt: skip
    return table(columns, rows)


def share_of_stability(of_rule: dict[int, dict]) -> dict[int, float]:
    """Spread of lambda * stability over that of adaptation, mean over windows, by seed: 0 changes no token's rank."""
    found = {}
    for seed, run in of_rule.items():
        spreads = [(w["stability_spread"], w["adaptation_spread"]) for w in run["windows"] if "stability_spread" in w]
        if spreads:
            found[seed] = run["run"]["stability"] * sum(a / b for a, b in spreads) / len(spreads)
    return found


def curve_of(run: dict, key: str) -> list[float]:
    return [point[key] for point in run["curve"]]


def first(runs: Runs, rule: str, key: str) -> dict[int, float]:
    return {seed: curve_of(run, key)[0] for seed, run in runs.get(rule, {}).items()}


def last(runs: Runs, rule: str, key: str) -> dict[int, float]:
    return {seed: curve_of(run, key)[-1] for seed, run in runs.get(rule, {}).items()}


def at_equal_target(runs: Runs) -> dict[str, dict[int, float]]:
    """General text loss by rule and seed, where the target loss first is at the lowest level that all rules reach."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for seed in sorted({seed for of_rule in runs.values() for seed in of_rule}):
        of_seed = {rule: of_rule[seed] for rule, of_rule in runs.items() if seed in of_rule}
        level = max(min(curve_of(run, "target_loss")) for run in of_seed.values())
        for rule, run in of_seed.items():
            found[rule][seed] = first_crossing(curve_of(run, "target_loss"), curve_of(run, "text_loss"), level)
    return found


def foretold(runs: Runs) -> str:
    """How well each prediction ranks windows by the measured change, over all of them and among equally late ones."""
    rows = []
    for key, what in PREDICTORS.items():
        groups = windows(runs, key)
        if not groups:
            continue
        parts = [points for _, points in groups]
        cells = [_with_interval(groups, lambda points: points), _with_interval(groups, without_time)]
        rows.append([f"{key}: {what}", str(sum(map(len, parts))), str(len(groups)), *cells])
    columns = ["prediction", "windows", "runs", "rank correlation with the change", "among windows of the same steps"]
    return table(columns, rows)


Groups = list[tuple[np.ndarray, np.ndarray]]  # of each run: starts of its windows, (predicted, measured)


def windows(runs: Runs, key: str) -> Groups:
    """(starts W, points W x 2) of every run that has the prediction."""
    found = []
    for of_rule in runs.values():
        for run in of_rule.values():
            known = [window for window in run["windows"] if key in window]
            if known:
                starts = np.array([window["start"] for window in known])
                found.append((starts, np.array([[window[key], window["measured"]] for window in known])))
    return found


def without_time(points: np.ndarray) -> np.ndarray:
    """Points S x 3 (start, predicted, measured), less the mean of all that start at the same step: W x 2."""
    found = points[:, 1:].astype(np.float64)
    for start in np.unique(points[:, 0]):
        here = points[:, 0] == start
        found[here] -= found[here].mean(0)
    return found


def _with_interval(groups: Groups, prepare: Callable[[np.ndarray], np.ndarray]) -> str:
    """Over all windows, with the 95% interval of runs drawn anew."""
    stacked = [np.column_stack([starts, points]) for starts, points in groups]

    def statistic(points: np.ndarray) -> float:
        return rank_correlation(prepare(points)[:, -2:])

    low, high = bootstrap_interval(stacked, statistic)
    value = statistic(np.concatenate(stacked))
    if np.isnan(value):
        return ""
    return f"{value:.2f}" + ("" if np.isnan(low) else f" ({low:.2f} to {high:.2f})")
