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
    """Held-out problems that models solve by greedy decoding: mean over seeds."""
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        found[run["run"]["name"], run["run"]["set"]].append(run)
    rows = []
    for (name, task), runs in sorted(found.items(), key=lambda item: mean_solved(item[1])):
        of_problems = 2 * sum(run["standard_error"] for run in runs) / len(runs)  # the same ones for every seed
        _, of_seeds = mean_interval([run["solved"] for run in runs])
        seeds = "" if math.isnan(of_seeds) else f"± {of_seeds:.1%}"
        rows.append(
            [
                name,
                task,
                str(len(runs)),
                str(runs[0]["problems"]),
                f"{mean_solved(runs):.1%}",
                f"± {of_problems:.1%}",
                seeds,
            ]
        )
    return table(["after", "set", "seeds", "problems", "solved", "95% over problems", "95% over seeds"], rows)


def mean_solved(runs: list[dict]) -> float:
    return sum(run["solved"] for run in runs) / len(runs)
