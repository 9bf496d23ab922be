"""Finished runs, from their JSON files."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence.grid import FULL


@dataclass(frozen=True)
class Results:
    """Finished runs by set and rule name, then by seed."""

    runs: dict[str, dict[str, dict[int, dict]]]

    def losses(self, name: str, rule: str, step: int | None = None) -> dict[int, float]:
        """Held-out loss by seed, at the rule's own last step or at `step`."""
        found = {}
        for seed, run in self.runs[name].get(rule, {}).items():
            losses = {int(key): value for key, value in run["target_loss"].items()}
            at = step or (min(losses) if rule == FULL.name else max(losses))
            if at in losses:
                found[seed] = losses[at]
        return found

    def field(self, name: str, rule: str, *path: str) -> dict[int, float]:
        """A figure of each run by seed; runs without it are left out."""
        return by_seed(self.runs[name].get(rule, {}), *path)


def read_results(folder: Path) -> Results:
    runs: dict = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        setting = run["run"]
        runs[setting["set"]][setting["rule"]["name"]][setting["seed"]] = run
    return Results(runs)


Runs = dict[str, dict[int, dict]]  # finished runs of a study with one set, by rule name, then by seed


def read_runs(folder: Path) -> Runs:
    """By name of the rule."""
    runs: Runs = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        runs[run["run"]["name"]][run["run"]["seed"]] = run
    return {rule: dict(sorted(of_rule.items())) for rule, of_rule in sorted(runs.items())}


def by_seed(of_rule: dict[int, dict], *path: str) -> dict[int, float]:
    """A figure of each run by seed; runs without it are left out."""
    found = {}
    for seed, run in of_rule.items():
        value = run
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and not math.isnan(value):
            found[seed] = value
    return found
