"""Runs the study, or what is missing of it, and writes tables and plots.

    python -m benchmarks.evidence --data-dir DIR [--output docs/results/evidence] [--full] [--only training tables]

DIR holds public data as JSON lines (see docs/results/README.md). A finished run is one file named by a hash of its
settings; the same command goes on where it was stopped.
"""

import argparse
import hashlib
import json
import logging
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.common import machine
from benchmarks.evidence.grid import Run, runs
from benchmarks.evidence.runs import Lab, Study

logger = logging.getLogger("benchmarks.evidence")
PARTS = ("training", "tables")


def key_of(study: Study, run: Run) -> str:
    """Hash of everything that the result depends on."""
    settings = {"study": asdict(study), "run": asdict(run)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def train(study: Study, wanted: list[Run], data_dir: Path, output: Path) -> None:
    """Every run whose file is missing."""
    folder = output / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [run for run in wanted if not (folder / f"{key_of(study, run)}.json").exists()]
    logger.info("%d runs wanted, %d to do", len(wanted), len(missing))
    lab = Lab(data_dir, study) if missing else None
    for number, run in enumerate(missing):
        result = lab.run(run.set, run.seed, run.rule, run.measure_at, run.retention_at, run.choices)
        settings = {"study": asdict(study), "run": asdict(run)}
        versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
        text = json.dumps(settings | result | {"versions": versions, "machine": machine()}, indent=1)
        path = folder / f"{key_of(study, run)}.json"
        path.with_suffix(".tmp").write_text(text + "\n")
        path.with_suffix(".tmp").rename(path)
        loss = list(result["target_loss"].values())
        logger.info("%d/%d %s seed %d, %s: %s", number + 1, len(missing), run.set, run.seed, run.rule.name, loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results/evidence"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="the default")
    length.add_argument("--full", action="store_true", help="more seeds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sets", nargs="+", help="only these sets")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--rules", nargs="+", help="only rules with one of these names")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    wanted = [
        run
        for run in runs(arguments.full)
        if (arguments.sets is None or run.set in arguments.sets)
        and (arguments.seeds is None or run.seed in arguments.seeds)
        and (arguments.rules is None or run.rule.name in arguments.rules)
    ]
    wanted.sort(key=lambda run: (run.seed,))  # stable: runs of a task stay together
    if "training" in arguments.only:
        train(Study(), wanted, arguments.data_dir, arguments.output)


if __name__ == "__main__":
    main()
