"""Tables of which signals find the noise and of what trained models solve."""

import json
import math
from collections import defaultdict
from pathlib import Path

from benchmarks.evidence.report import table
from benchmarks.evidence.stats import mean_interval


def detection(folder: Path) -> str:
    """AUROC of the signals: mean over a run's checkpoints, then mean and 95% interval over seeds."""
    areas: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("detection-*.json")):
        run = json.loads(path.read_text())
        for signal, checkpoints in run["auroc"].items():
            for key in checkpoints[0]:
                found = [areas_of[key] for areas_of in checkpoints if not math.isnan(areas_of[key])]
                if found:
                    areas[signal][f"{run['set']}: {key}"].append(sum(found) / len(found))
    keys = sorted({key for of_signal in areas.values() for key in of_signal})
    rows = [[signal, *(area(of_signal.get(key, [])) for key in keys)] for signal, of_signal in areas.items()]
    return table(["signal", *keys], rows)


def area(values: list[float]) -> str:
    if not values:
        return ""
    mean, width = mean_interval(values)
    return f"{mean:.2f}" + ("" if math.isnan(width) else f" ± {width:.2f}")


def answers(folder: Path) -> str:
    """Held-out problems that a model solves by greedy decoding."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = [
        [run["run"]["name"], run["run"]["set"], str(run["run"]["seed"]), str(run["problems"]),
         f"{run['solved']:.1%} ± {2 * run['standard_error']:.1%}"]
        for run in sorted(runs, key=lambda run: run["solved"])
    ]  # fmt: skip
    return table(["after", "set", "seed", "problems", "solved (95%)"], rows)
