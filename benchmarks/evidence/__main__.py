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
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.common import machine
from benchmarks.evidence import report
from benchmarks.evidence.detection import SIGNALS, detect
from benchmarks.evidence.grid import Run, runs
from benchmarks.evidence.runs import Lab, Study

logger = logging.getLogger("benchmarks.evidence")
PARTS = ("training", "detection", "tables")
DETECTION = (("mixed", 0), ("tokens", 0))


LATER = ("excess",)  # settings of a rule that came later: left out where they are None, so that older results stand


def settings_of(study: Study, run: Run) -> dict:
    """Everything that a result depends on, as JSON values."""
    found = asdict(run)
    found["rule"] = {name: value for name, value in found["rule"].items() if name not in LATER or value is not None}
    return {"study": asdict(study), "run": found}


def key_of(settings: dict) -> str:
    """Hash of everything that a result depends on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write(path: Path, result: dict) -> None:
    """A finished result with versions and machine; a file that is there is complete."""
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(
        json.dumps(result | {"versions": versions, "machine": machine()}, indent=1) + "\n"
    )
    path.with_suffix(".tmp").rename(path)


class Work:
    """What is missing in the output folder; the model is loaded when something is."""

    def __init__(self, study: Study, data_dir: Path, output: Path) -> None:
        self.study, self.data_dir, self.output = study, data_dir, output

    @cached_property
    def lab(self) -> Lab:
        return Lab(self.data_dir, self.study)

    def train(self, wanted: list[Run]) -> None:
        """Every run whose file is missing."""
        todo = []
        for run in wanted:
            settings = settings_of(self.study, run)
            path = self.output / "trained" / f"{key_of(settings)}.json"
            if not path.exists():
                todo.append((run, settings, path))
        logger.info("%d runs wanted, %d to do", len(wanted), len(todo))
        for number, (run, settings, path) in enumerate(todo):
            result = self.lab.run(run.set, run.seed, run.rule, run.measure_at, run.retention_at, run.choices)
            write(path, settings | result)
            losses = list(result["target_loss"].values())
            logger.info("%d/%d %s seed %d, %s: %s", number + 1, len(todo), run.set, run.seed, run.rule.name, losses)

    def detect(self) -> None:
        for name, seed in DETECTION:
            settings = {"study": asdict(self.study), "set": name, "seed": seed, "signals": sorted(SIGNALS)}
            path = self.output / f"detection-{key_of(settings)}.json"
            if not path.exists():
                logger.info("detection, %s seed %d", name, seed)
                write(path, settings | detect(self.lab, name, seed))

    def tables(self) -> None:
        from benchmarks.evidence import plots  # matplotlib: the `dev` extra

        results = report.read_results(self.output / "trained")
        (self.output / "tables.md").write_text(report.all_tables(results, self.output))
        readme = self.output.parent / "README.md"
        if readme.exists():
            readme.write_text(report.fill(readme.read_text(), report.readme_blocks(results, self.output)))
        plots.differences(results, self.output / "differences.png", fewest=1)
        plots.compute(results, "mixed", self.output / "compute.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results/evidence"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="the default")
    length.add_argument("--full", action="store_true", help="more seeds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tasks", nargs="+", help="only these, as set:seed: tokens:0 clean:1")
    parser.add_argument("--rules", nargs="+", help="only rules with one of these names")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    wanted = [run for run in runs(arguments.full) if arguments.rules is None or run.rule.name in arguments.rules]
    if arguments.tasks is not None:
        wanted = [run for run in wanted if f"{run.set}:{run.seed}" in arguments.tasks]
    work = Work(Study(), arguments.data_dir, arguments.output)
    if "training" in arguments.only:
        work.train(wanted)
    if "detection" in arguments.only:
        work.detect()
    if "tables" in arguments.only:
        work.tables()


if __name__ == "__main__":
    main()
