"""Table of in-run's default with more rows a step, next to full SFT that goes on for as long."""

from benchmarks.evidence.grid import LARGER_STEPS, SHARED_RULES
from benchmarks.evidence.report import Results, difference, mean, set_names, steps_cpu, table, wins
from benchmarks.evidence.stats import paired

FULL, IN_RUN = f"full, {max(LARGER_STEPS)} steps", SHARED_RULES[0].name


def larger(results: Results) -> str:
    """Held-out loss and CPU seconds; in-run minus full SFT at equal steps and at equal compute."""
    return table(
        ["", "seeds", "held-out loss", "CPU s, scoring included", "in-run minus this", "in-run is better in"],
        [row for name in set_names(results) for row in _of_set(results, name)],
    )


def _of_set(results: Results, name: str) -> list[list[str]]:
    full, in_run = results.runs[name][FULL], results.runs[name][IN_RUN]
    masked = results.losses(name, IN_RUN)
    spent = {seed: sum(run["cpu_seconds"].values()) for seed, run in in_run.items()}
    rows = [[f"`{name}`, in-run, 48 steps", str(len(masked)), mean(masked), _seconds(spent), "", ""]]
    for steps in LARGER_STEPS:
        losses = results.losses(name, FULL, steps)
        rows.append(_compared(f"`{name}`, full SFT, {steps} steps", masked, losses, {
            seed: steps_cpu(run, steps) for seed, run in full.items()
        }))  # fmt: skip
    equal = {seed: equal_steps(run, spent[seed]) for seed, run in full.items() if seed in spent}
    losses = {seed: float(full[seed]["target_loss"][str(steps)]) for seed, steps in equal.items() if steps}
    cpu = {seed: steps_cpu(full[seed], equal[seed]) for seed in losses}
    rows.append(_compared(f"`{name}`, full SFT, the first of these to cost as much", masked, losses, cpu))
    return rows


def equal_steps(full: dict, seconds: float) -> int:
    """The first measured step by which full SFT has taken as many CPU seconds; 0 where none has."""
    return next((steps for steps in LARGER_STEPS if steps_cpu(full, steps) >= seconds), 0)


def _compared(what: str, masked: dict[int, float], losses: dict[int, float], cpu: dict[int, float]) -> list[str]:
    found = paired(masked, losses)
    return [what, str(len(losses)), mean(losses), _seconds(cpu), difference(found), wins(found)]


def _seconds(by_seed: dict[int, float]) -> str:
    return f"{sum(by_seed.values()) / len(by_seed):.0f}" if by_seed else ""
