"""Tables of which signals find the noise and of what trained models solve."""

import json
import math
from collections import defaultdict
from pathlib import Path

from benchmarks.evidence.report import table, with_interval


def detection(folder: Path) -> str:
    """AUROC of the signals: mean over a run's checkpoints, then mean and 95% interval over seeds."""
    areas: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("detection-*.json")):
        run = json.loads(path.read_text())
        for signal, checkpoints in run["auroc"].items():
            for key in checkpoints[0]:
                known = [areas_of[key] for areas_of in checkpoints if not math.isnan(areas_of[key])]
                if known:
                    areas[signal][f"{run['set']}: {key}"].append(sum(known) / len(known))
    keys = sorted({key for of_signal in areas.values() for key in of_signal})
    rows = [[name, *(with_interval(found.get(key, []), ".2f") for key in keys)] for name, found in areas.items()]
    return table(["signal", *keys], rows)


def answers(folder: Path) -> str:
    """Held-out problems that models solve by greedy decoding: mean over seeds."""
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        found[run["run"]["name"], run["run"]["set"]].append(run)
    rows = [
        [name, task, str(len(runs)), str(runs[0]["problems"]), with_interval([run["solved"] for run in runs], ".1%"),
         f"± {2 * mean_of(runs, 'standard_error'):.1%}"]
        for (name, task), runs in sorted(found.items(), key=lambda item: mean_of(item[1], "solved"))
    ]  # fmt: skip
    return table(["after", "set", "seeds", "problems", "solved (95% over seeds)", "95% over problems"], rows)


def mean_of(runs: list[dict], field: str) -> float:
    """The problems are the same for every seed, so their standard errors do not shrink with more of them."""
    return sum(run[field] for run in runs) / len(runs)
