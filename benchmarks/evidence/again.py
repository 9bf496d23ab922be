"""The same runs made a second time, from nothing: how far the two results are apart."""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.evidence.forgetting_report import last
from benchmarks.evidence.grid import FULL
from benchmarks.evidence.preference_report import held_out
from benchmarks.evidence.report import difference, mean, table
from benchmarks.evidence.results import read_results, read_runs
from benchmarks.evidence.stats import paired

FILE = "again.json"
Losses = dict[tuple[str, str], dict[int, float]]  # by study or set and rule, then by seed


def compare(first: Path, again: Path) -> None:
    """Writes the held-out losses of every run that both output folders have, as JSON, into the first.

    first, again: output folders. What the runs in `again` took is summed, the model's loading and the first of each
    set's passes over the validation rows included."""
    both = losses_of(first), losses_of(again)
    runs = [json.loads(path.read_text()) for path in again.glob("*/*.json")]
    found = {
        "run_seconds": sum(run["run_seconds"] for run in runs),
        "runs": len(runs),
        "machine": runs[0]["machine"],
        "losses": [
            {"set": name, "rule": rule, "seed": seed, "first": both[0][name, rule][seed], "again": loss}
            for (name, rule), of_rule in sorted(both[1].items())
            for seed, loss in sorted(of_rule.items())
            if seed in both[0].get((name, rule), {})
        ],
    }
    (first / FILE).write_text(json.dumps(found, indent=1) + "\n")


def losses_of(folder: Path) -> Losses:
    """Held-out loss after the last step; full SFT's at the step at which it is compared."""
    trained = read_results(folder / "trained")
    found = {(name, rule): trained.losses(name, rule) for name, rules in trained.runs.items() for rule in rules}
    forgotten, preferred = (read_runs(folder / name) for name in ("forgetting", "preference"))
    found |= {("forgetting", rule): last(forgotten, rule, "target_loss") for rule in forgotten}
    return found | {("preference", rule): held_out(of_rule, "dpo_loss") for rule, of_rule in preferred.items()}


def again(folder: Path) -> str:
    """Table of both results, by set and rule; empty where no second one is there."""
    path = folder / FILE
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    where = "{cores} cores ({cpu})".format_map(found["machine"])
    said = f"{found['runs']} runs in {found['run_seconds'] / 60:.0f} minutes, {where}."
    columns = ["", "rule", "seeds", "held-out loss", "again", "furthest apart", "minus full", "again"]
    return f"{said}\n\n" + table(columns, list(_rows(found["losses"])))


def _rows(losses: list[dict]) -> Iterator[list[str]]:
    both: dict[str, Losses] = {"first": {}, "again": {}}
    for run in losses:
        for which, of_rule in both.items():
            of_rule.setdefault((run["set"], run["rule"]), {})[run["seed"]] = run[which]
    for name, rule in both["first"]:
        pair = [of_rule[name, rule] for of_rule in both.values()]
        apart = max(abs(a - pair[1][seed]) for seed, a in pair[0].items())
        minus = ["" if rule == FULL.name else difference(paired(of_rule[name, rule], of_rule[name, FULL.name]))
                 for of_rule in both.values()]  # fmt: skip
        yield [name, rule, str(len(pair[0])), *map(mean, pair), f"{apart:.0e}", *minus]
