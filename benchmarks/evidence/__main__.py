"""Runs the study, or what is missing of it, and writes tables and plots.

    python -m benchmarks.evidence --data-dir DIR [--output docs/results/evidence] [--full] [--only training tables]

DIR holds public data as JSON lines (see docs/results/README.md). A finished run is one file named by a hash of its
settings; the same command goes on where it was stopped. Parts: training under noise, detection of noise, problems
solved, forgetting, preference pairs, tables.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.common import machine
from benchmarks.evidence import (
    again,
    forgetting_report,
    found_report,
    frozen_report,
    larger_report,
    preference_report,
    report,
    results,
)
from benchmarks.evidence.answers import AnswerCheck
from benchmarks.evidence.costs import Clock
from benchmarks.evidence.detection import SIGNALS, detect
from benchmarks.evidence.forgetting import Case, Forgetting, ForgettingLab, cases
from benchmarks.evidence.grid import EXCESS_RULE, FULL, LARGER, NOISY, ORACLE, Run, larger_runs, runs
from benchmarks.evidence.preference import CLEAN_PAIR_RULES, PAIR_RULES, PairRule, Preference, PreferenceLab
from benchmarks.evidence.rules import Rule
from benchmarks.evidence.runs import Lab, Study
from benchmarks.evidence.training import Training

logger = logging.getLogger("benchmarks.evidence")
OUTPUT = Path("docs/results/evidence")
Settings = TypeVar("Settings", Forgetting, Preference)
PARTS = ("training", "larger", "detection", "answers", "forgetting", "preference", "tables")
SHORT_PARTS = ("training", "forgetting", "preference", "tables")
SHORT_RULES = {  # of the other studies, on one seed
    "forgetting": ["full", "exact, worst 20%, lambda 0", "exact, worst 20%, lambda 1.5"],
    "preference": ["full", "oracle", "values, worst 20% of pairs", "random 33% of pairs"],
}
DETECTION = tuple((name, seed) for seed in range(3) for name in NOISY)
ANSWERED = tuple(  # None: the model as it was, the same for every seed
    ("tokens", seed, rule) for seed in range(3) for rule in (None, FULL, ORACLE, EXCESS_RULE) if rule or not seed
)
PROBLEMS = 192  # that each of those models is asked


# Settings of a rule that came later: left out where they are None, so that older results stand
LATER = ("excess", "shared", "token_keep", "checkpoints")


def settings_of(study: Study, run: Run) -> dict:
    """Everything that a result depends on, as JSON values."""
    return {"study": asdict(study), "run": asdict(run) | {"rule": rule_settings(run.rule)}}


def rule_settings(rule: Rule) -> dict:
    return {name: value for name, value in asdict(rule).items() if name not in LATER or value is not None}


def forgetting_settings(settings: Forgetting, seed: int, case: Case) -> dict:
    """As `settings_of`."""
    run = {"name": case.rule.name, "seed": seed, "rule": rule_settings(case.rule), "stability": case.stability}
    return {"forgetting": asdict(settings), "run": run}


def preference_settings(settings: Preference, seed: int, rule: PairRule) -> dict:
    """As `settings_of`."""
    return {"preference": asdict(settings), "run": {"name": rule.name, "seed": seed, "rule": asdict(rule)}}


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
        self._missing(
            "trained",
            (
                (settings_of(self.study, run), lambda run=run: self.lab.run(
                    run.set, run.seed, run.rule, run.measure_at, run.retention_at, run.choices
                ))
                for run in wanted
            ),
        )  # fmt: skip

    def forget(self, seeds: Iterable[int], rules: list[str] | None, settings: Forgetting) -> None:
        """Every run of the forgetting study whose file is missing."""
        lab = cache(lambda: ForgettingLab(self.data_dir, settings))
        wanted = [
            (seed, case) for seed in seeds for case in cases(settings) if rules is None or case.rule.name in rules
        ]
        self._missing(
            "forgetting",
            (
                (forgetting_settings(settings, seed, case), lambda seed=seed, case=case: lab().run(seed, case))
                for seed, case in wanted
            ),
        )

    def prefer(self, seeds: Iterable[int], rules: list[str] | None, settings: Preference) -> None:
        """Every run on preference pairs whose file is missing; without flipped pairs, of the rules for that alone."""
        lab = cache(lambda: PreferenceLab(self.data_dir, settings))
        of_set, folder = (PAIR_RULES, "preference") if settings.flipped else (CLEAN_PAIR_RULES, "preference_clean")
        wanted = [(seed, rule) for seed in seeds for rule in of_set if rules is None or rule.name in rules]
        self._missing(
            folder,
            (
                (preference_settings(settings, seed, rule), lambda seed=seed, rule=rule: lab().run(seed, rule))
                for seed, rule in wanted
            ),
        )

    def answer(self, wanted: Iterable[tuple[str, int, Rule | None]]) -> None:
        """Problems solved after some of the training runs (set, seed, rule), which run once more for it."""
        asked = cache(lambda: AnswerCheck(self.study.model, self.lab.source.encoder, self.lab.files["test"], PROBLEMS))

        def solved(name: str, seed: int, rule: Rule | None) -> dict:
            self.lab.trainer.reset()
            if rule is not None:
                self.lab.run(name, seed, rule, (), rule.steps, False)
            asked().load(self.lab.scoring)
            return asked().solved()

        self._missing(
            "answers",
            (
                (
                    {"study": asdict(self.study), "problems": PROBLEMS, "run": {
                        "name": rule.name if rule else "before training", "set": name, "seed": seed,
                        "rule": rule and rule_settings(rule),
                    }},
                    lambda case=(name, seed, rule): solved(*case),
                )
                for name, seed, rule in wanted
            ),
        )  # fmt: skip

    def _missing(self, folder: str, wanted: Iterable[tuple[dict, Callable[[], dict]]]) -> None:
        """wanted: (settings, what gives the result)."""
        found = [(settings, run, self.output / folder / f"{key_of(settings)}.json") for settings, run in wanted]
        todo = [item for item in found if not item[2].exists()]
        logger.info("%s: %d runs wanted, %d to do", folder, len(found), len(todo))
        for number, (settings, run, path) in enumerate(todo):
            with Clock() as clock:
                result = run()
            write(path, settings | result | {"run_seconds": round(clock.wall, 1)})
            setting = settings["run"]
            name = setting.get("name") or f"{setting['set']}, {setting['rule']['name']}"
            logger.info("%d/%d seed %d, %s: %.0f s", number + 1, len(todo), setting["seed"], name, clock.wall)

    def detect(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Every (set, seed) whose file is missing."""
        for name, seed in wanted:
            settings = {"study": asdict(self.study), "set": name, "seed": seed, "signals": sorted(SIGNALS)}
            path = self.output / f"detection-{key_of(settings)}.json"
            if not path.exists():
                logger.info("detection, %s seed %d", name, seed)
                write(path, settings | detect(self.lab, name, seed))

    def tables(self) -> None:
        from benchmarks.evidence import plots  # matplotlib: the `dev` extra

        trained = results.read_results(self.output / "trained")
        (self.output / "tables.md").write_text(report.all_tables(trained))
        forgotten, preferred, clean = (
            results.read_runs(self.output / name) for name in ("forgetting", "preference", "preference_clean")
        )
        blocks = forgetting_report.blocks(forgotten) | preference_report.blocks(preferred, clean)
        blocks["frozen"] = frozen_report.frozen(trained)
        blocks["larger"] = larger_report.larger(results.read_results(self.output / "larger" / "trained"))
        blocks["detection"] = found_report.detection(self.output)
        blocks["answers"] = found_report.answers(self.output / "answers")
        blocks["again"] = again.again(self.output)
        readme = self.output.parent / "README.md"
        if readme.exists():
            readme.write_text(report.fill(readme.read_text(), report.readme_blocks(trained) | blocks))
        if forgotten:
            plots.forgetting(forgotten, self.output / "forgetting.png")
        plots.differences(trained, self.output / "differences.png", fewest=1)
        plots.compute(trained, "mixed", self.output / "compute.png")


def sized(settings: Settings, size: dict) -> Settings:
    """With another model and other layers."""
    return replace(settings, study=replace(settings.study, **size))


def chosen(grid: Iterable[Run], arguments: argparse.Namespace) -> list[Run]:
    """The runs that --seeds, --tasks and --rules name; all where none is given."""
    return [
        run
        for run in grid
        if (arguments.rules is None or run.rule.name in arguments.rules) and asked_for(run.set, run.seed, arguments)
    ]


def asked_for(name: str, seed: int, arguments: argparse.Namespace) -> bool:
    """Whether --seeds and --tasks name a set and seed, or are not given."""
    return (arguments.seeds is None or seed in arguments.seeds) and (
        arguments.tasks is None or f"{name}:{seed}" in arguments.tasks
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT}; of another model or other layers, give one")
    parser.add_argument("--model", default=Study.model, help="a Llama-like one: hub name or folder")
    parser.add_argument("--layers", type=int, default=Study.layers, help="the last ones, trained and valued; 0: all")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="the default")
    length.add_argument("--full", action="store_true", help="all rules, all parts, more seeds")
    parser.add_argument("--only", nargs="+", choices=PARTS, help=f"default: {' '.join(SHORT_PARTS)}, with --full all")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--tasks", nargs="+", help="only these, as set:seed: tokens:0 clean:1")
    parser.add_argument("--rules", nargs="+", help="only rules with one of these names")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", type=Path, help="output of the same runs made anew: the tables say how far apart")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    size = {"model": arguments.model, "layers": arguments.layers}
    study, output = replace(Study(), **size), arguments.output or OUTPUT
    if arguments.output is None and study != Study():
        parser.error("results of another model or other layers need an --output of their own")
    parts = arguments.only or (PARTS if arguments.full else SHORT_PARTS)
    work = Work(study, arguments.data_dir, output)
    if "training" in parts:
        work.train(chosen(runs(arguments.full), arguments))
    if "larger" in parts:
        larger = replace(study, training=Training(rows_per_step=LARGER * Training.rows_per_step))
        Work(larger, arguments.data_dir, output / "larger").train(chosen(larger_runs(), arguments))
    if "detection" in parts:
        work.detect(task for task in DETECTION if asked_for(*task, arguments))
    if "answers" in parts:
        work.answer(case for case in ANSWERED if asked_for(*case[:2], arguments))
    seeds = arguments.seeds or range(1, 4 if arguments.full else 2)  # their trial runs had seed 0
    named = {} if arguments.full else SHORT_RULES
    if "forgetting" in parts:
        work.forget(seeds, arguments.rules or named.get("forgetting"), sized(Forgetting(), size))
    if "preference" in parts:
        for flipped in (Preference.flipped, 0.0) if arguments.full else (Preference.flipped,):
            work.prefer(seeds, arguments.rules or named.get("preference"), sized(Preference(flipped=flipped), size))
    if arguments.again:
        again.compare(output, arguments.again)
    if "tables" in parts:
        work.tables()


if __name__ == "__main__":
    main()
