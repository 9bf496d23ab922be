"""Preference pairs from sampled responses: `alphatoken pair --input RESPONSES --output PAIRS --judge verifier`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/pair.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.generate_config import PairConfig
from jobs import cli

CONFIG = PairConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _pair, argv, show=_show, prog="alphatoken pair")


def _pair(config: PairConfig) -> dict:
    from jobs.progress import progress_bar
    from pipelines.pair import check_pair, run_pair  # imports Ray: not before the arguments are right

    with progress_bar("prompts") as bar:
        if not bar.drawn:
            return run_pair(config)
        total = check_pair(config)[0]["counts"]["prompts"]
        return run_pair(config, lambda counts: bar.update(f"{counts['rows_out']:,} pairs", counts["prompts"], total))


def _show(config: PairConfig, manifest: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = manifest["counts"]
    table = Table(show_header=False, box=None)
    table.add_row("preference pairs", config.output)
    table.add_row("pairs", f"{counts['rows_out']:,} from {counts['prompts']:,} prompts")
    if counts["identical_responses"]:
        table.add_row("identical responses", f"{counts['identical_responses']:,}")
    if counts.get("empty_responses"):  # not counted by earlier versions
        table.add_row("empty responses", f"{counts['empty_responses']:,}")
    for reason, number in counts["quarantine_reasons"].items():
        table.add_row("set aside", f"{number:,}: {reason}")
    table.add_row("time", f"{manifest['seconds']:.0f} s")
    Console(soft_wrap=True, markup=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
