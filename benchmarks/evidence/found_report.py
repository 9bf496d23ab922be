"""Tables of which signals find the noise and of what trained models solve."""

import json
import math
from collections import defaultdict
from pathlib import Path

from benchmarks.evidence.report import table


def detection(folder: Path) -> str:
    """AUROC of the signals, mean over checkpoints and files (one for each set and seed)."""
    areas: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("detection-*.json")):
        run = json.loads(path.read_text())
        for signal, checkpoints in run["auroc"].items():
            for checkpoint in checkpoints:
                for key, value in checkpoint.items():
                    if not math.isnan(value):
                        areas[signal][f"{run['set']}: {key}"].append(value)
    keys = sorted({key for found in areas.values() for key in found})
    rows = [[s, *(f"{sum(v) / len(v):.2f}" if (v := found.get(k)) else "" for k in keys)] for s, found in areas.items()]
    return table(["signal", *keys], rows)


def answers(folder: Path) -> str:
    """Held-out problems that a model solves by greedy decoding."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = [
        [run["run"]["name"], run["run"]["set"], str(run["run"]["seed"]), str(run["problems"]),
         f"{run['solved']:.1%} ± {2 * run['standard_error']:.1%}"]
        for run in sorted(runs, key=lambda run: run["solved"])
    ]  # fmt: skip
    return table(["after", "set", "seed", "problems", "solved (95%)"], rows)
