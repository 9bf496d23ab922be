"""`python -m tests.faults.soak --minutes 20`: score and mask runs with random faults until the time is over.

Prints what was injected and what came of it. Exit code 1 on any loss, duplicate, unjust quarantine, or value or mask
other than the undisturbed run's.
"""

import argparse
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from alphatoken.errors import UserError
from pipelines.cluster import connect
from tests.faults.harness import ActorKiller, Bench, Findings, cut_off
from tests.faults.injection import Faults, tell

LONGEST_RUN = 90  # seconds: none begins when less is left

NAMES = {
    "failed": "runs that did not finish",
    "lost": "rows lost",
    "twice": "duplicates",
    "aside": "good rows in quarantine",
    "not_finite": "rows with values that are not finite",
    "other_values": "rows with other values",
    "other_masks": "rows with other masks",
}


class Soak:
    def __init__(self, folder: Path, seed: int, rows: int) -> None:
        self.draw = random.Random(seed)
        self.benches = [Bench(folder / "rows", rows, seed)]
        self.benches.append(Bench(folder / "pairs", rows // 2, seed, pairs=True, model=self.benches[0].model))
        self.injected: Counter = Counter()
        self.runs, self.rows, self.found = 0, 0, Counter()

    def run(self) -> Findings:
        """One score run and its mask run with some faults, and what they left."""
        bench, draw = draw_bench(self.draw, self.benches), self.draw
        config = bench.config(f"run-{self.runs}", num_actors=str(draw.randint(1, 2)))
        faults = self._faults(bench)
        for kind in draw.choices([signal.SIGINT, signal.SIGKILL], k=draw.choice([0, 0, 1, 2])):
            tell(config.output, faults)
            if cut_off(config, kind, draw.randint(1, 4)) is not None:
                self.injected["Ctrl-C" if kind == signal.SIGINT else "driver killed"] += 1
        if draw.random() < 0.25:
            self._fill_disk(bench, config, faults)
        killer = ActorKiller(draw, draw.sample(range(1, 8), draw.choice([0, 1, 2])))
        bench.score(config, faults, killer)
        self.injected["actor killed"] += killer.killed
        if draw.random() < 0.25:
            kind = draw.choice([signal.SIGINT, signal.SIGKILL])
            if cut_off(bench.mask_config(config), kind, draw.randint(1, 4)) is not None:
                self.injected["mask: " + ("Ctrl-C" if kind == signal.SIGINT else "driver killed")] += 1
        findings = bench.findings(config, bad=faults.deadly + faults.no_memory)
        self._count(bench, config, faults, findings)
        return findings

    def _faults(self, bench: Bench) -> Faults:
        draw = self.draw
        rows = bench.good_rows(draw, 6)
        deadly, memory, no_memory = draw.choice([0, 0, 1, 2]), draw.choice([0, 1, 3]), draw.choice([0, 0, 1])
        return Faults(
            draw.randrange(10**6), rows[:deadly], draw.choice([signal.SIGKILL, signal.SIGSEGV]),
            rows[2 : 2 + memory], rows[5 : 5 + no_memory], draw.choice([0.0, 0.1, 0.3]),
            slow=0.02, pairs=bench.pairs,
        )  # fmt: skip

    def _fill_disk(self, bench: Bench, config, faults: Faults) -> None:
        full = Faults(**(vars(faults) | {"quota": self.draw.randint(5_000, 40_000), "deadly": ()}))
        try:
            bench.score(config, full)
        except UserError as error:
            assert "no space is left" in str(error), error
            self.injected["disk full"] += 1

    def _count(self, bench: Bench, config, faults: Faults, findings: Findings) -> None:
        self.runs += 1
        self.rows += bench.rows
        self.injected["row that kills"] += len(faults.deadly)
        self.injected["batch out of memory"] += len(faults.memory)
        self.injected["row out of memory"] += len(faults.no_memory)
        self.injected["row not finite, no JSON"] += len(bench.expected.aside)
        self.injected["storage fails now and then (runs)"] += bool(faults.storage)
        self.found.update({name: len(rows) for name, rows in vars(findings).items()})
        if not findings:
            for path in Path(config.output).parent.glob(f"{Path(config.output).name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def table(self, seconds: float) -> Table:
        table = Table("", "", title=f"{self.runs} runs with faults in {seconds / 60:.1f} minutes", show_header=False)
        for name, count in sorted(self.injected.items()):
            table.add_row(f"injected: {name}", f"{count:,}")
        table.add_section()
        table.add_row("rows", f"{self.rows:,}")
        for name, text in NAMES.items():
            table.add_row(text, f"{self.found[name]:,}")
        return table


def draw_bench(draw: random.Random, benches: list[Bench]) -> Bench:
    return draw.choices(benches, weights=[2, 1])[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=120, help="rows of a data set")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    started, console = time.monotonic(), Console()
    with tempfile.TemporaryDirectory(prefix="alphatoken-soak-") as folder:
        connect(num_cpus=4)
        soak = Soak(Path(folder), options.seed, options.rows)
        while (seconds := time.monotonic() - started) < 60 * options.minutes - LONGEST_RUN or not soak.runs:
            try:
                findings = soak.run()
            except Exception as error:  # a run that did not come through is what this looks for
                console.print_exception()
                soak.runs += 1
                soak.found["failed"] += 1
                findings = f"failed ({type(error).__name__})"
            console.print(f"run {soak.runs} ({seconds:.0f} s): {findings or 'as undisturbed'}")
        console.print(soak.table(time.monotonic() - started))
    return 1 if any(soak.found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
