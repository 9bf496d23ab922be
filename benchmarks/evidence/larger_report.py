"""Table of in-run's default with more rows a step, next to full SFT that goes on for as long."""

from benchmarks.evidence.grid import FULL_LONGER, LARGER_STEPS, SHARED_RULES
from benchmarks.evidence.report import all_cpu, difference, mean, mean_seconds, set_names, steps_cpu, table, wins
from benchmarks.evidence.results import Results
from benchmarks.evidence.stats import paired

FULL, IN_RUN = FULL_LONGER.name, SHARED_RULES[0].name


def larger(results: Results) -> str:
    """Held-out loss and CPU seconds; in-run minus full SFT at equal steps and at equal compute."""
    return table(
        ["", "seeds", "held-out loss", "CPU s, scoring included", "in-run minus this", "in-run is better in"],
        [row for name in set_names(results) for row in _of_set(results, name)],
    )


def _of_set(results: Results, name: str) -> list[list[str]]:
    full, masked = results.runs[name][FULL], results.losses(name, IN_RUN)
    spent = {seed: all_cpu(run) for seed, run in results.runs[name][IN_RUN].items()}
    rows = [[f"`{name}`, in-run, 48 steps", str(len(masked)), mean(masked), mean_seconds(spent.values()), "", ""]]
    at = {f"{steps} steps": dict.fromkeys(full, steps) for steps in LARGER_STEPS}
    at["the first of these to cost as much"] = {
        seed: steps for seed in spent if seed in full and (steps := equal_steps(full[seed], spent[seed]))
    }
    for what, steps_of in at.items():
        losses = {seed: full[seed]["target_loss"][str(steps)] for seed, steps in steps_of.items()}
        cpu = [steps_cpu(full[seed], steps) for seed, steps in steps_of.items()]
        found = paired(masked, losses)
        cells = [str(len(losses)), mean(losses), mean_seconds(cpu), difference(found), wins(found)]
        rows.append([f"`{name}`, full SFT, {what}", *cells])
    return rows


def equal_steps(full: dict, seconds: float) -> int:
    """The first measured step by which full SFT has taken as many CPU seconds; 0 where none has."""
    return next((steps for steps in LARGER_STEPS if steps_cpu(full, steps) >= seconds), 0)
