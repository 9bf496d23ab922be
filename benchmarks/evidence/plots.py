"""Plots of the same figures as the tables. matplotlib is in the `dev` extra."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from benchmarks.evidence.report import ADDED, FULL, ORACLE, is_compared  # noqa: E402
from benchmarks.evidence.results import Results, Runs  # noqa: E402
from benchmarks.evidence.stats import mean_interval, paired  # noqa: E402

TITLES = {
    "mixed": "half of the rows noisy",
    "tokens": "a fifth of the digits wrong",
    "clean": "clean",
    "numbers": "half of the rows with wrong numbers",
}


def differences(results: Results, path: Path, fewest: int) -> None:
    """Held-out loss minus full SFT: a dot per seed, the mean, and the 95% interval, one panel per set."""
    names = [name for name in TITLES if name in results.runs]
    figure, axes = pyplot.subplots(len(names), 1, figsize=(8, 2.9 * len(names)), squeeze=False, layout="constrained")
    for axis, name in zip(axes[:, 0], names, strict=True):
        full = results.losses(name, FULL)
        found = {
            rule: values
            for rule in results.runs[name]
            if is_compared(rule) and rule in results.runs[name]
            if len(values := paired(results.losses(name, rule), full)) >= fewest
        }
        ordered = sorted(found, key=lambda rule: -sum(found[rule]) / len(found[rule]))
        for place, rule in enumerate(ordered):
            mean, width = mean_interval(found[rule])
            colour = "tab:green" if rule == ORACLE else "tab:blue"
            axis.errorbar(mean, place, xerr=width, fmt="s", color=colour, capsize=3)
            axis.plot(found[rule], [place] * len(found[rule]), ".", color="grey", zorder=3)
        axis.set_yticks(range(len(ordered)), ordered)
        axis.set_ylim(-0.6, len(ordered) - 0.4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{name}: {TITLES[name]}", fontsize=10)
    axes[-1, 0].set_xlabel("held-out loss minus full SFT, same seed and steps (left is better)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def compute(results: Results, name: str, path: Path) -> None:
    """Held-out loss against CPU seconds, scoring included; full SFT at several lengths."""
    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    line: list[tuple[float, float]] = []
    for rule, by_seed in results.runs[name].items():
        if rule.endswith(ADDED):
            continue
        for step in sorted({int(key) for run in by_seed.values() for key in run["target_loss"]}):
            losses = results.losses(name, rule, step)
            if not losses:
                continue
            cpu = [
                run["cpu_seconds"]["train"] * step / run["run"]["rule"]["steps"] + run["cpu_seconds"]["score"]
                for seed, run in by_seed.items()
                if seed in losses
            ]
            point = (sum(cpu) / len(cpu), sum(losses.values()) / len(losses))
            if rule.startswith(FULL):
                line.append(point)
                axis.annotate(f"full, {step} steps", point, textcoords="offset points", xytext=(4, 5), fontsize=8)
            else:
                axis.plot(*point, "o", color="tab:green" if rule == ORACLE else "tab:blue")
                axis.annotate(rule, point, textcoords="offset points", xytext=(4, 5), fontsize=8)
    axis.plot(*zip(*sorted(line), strict=True), "s-", color="black")
    axis.set_xlabel("CPU seconds, scoring included")
    axis.set_ylabel("held-out loss (mean over seeds)")
    axis.set_title(f"{name}: {TITLES[name]}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def forgetting(runs: Runs, path: Path) -> None:
    """General text loss against target loss as training goes on: lower and further left is better."""
    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for rule, of_rule in runs.items():
        curves = [[(p["target_loss"], p["text_loss"]) for p in run["curve"]] for run in of_rule.values()]
        steps = zip(*curves, strict=True)
        mean = [tuple(sum(values) / len(values) for values in zip(*points, strict=True)) for points in steps]
        axis.plot(*zip(*mean, strict=True), "s-" if rule == FULL else "o-", markersize=3, label=rule)
    axis.set_xlabel("target loss (mean over seeds)")
    axis.set_ylabel("general text loss")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
