"""Adaptation and stability of every response token: `alphatoken score --model M --validation V --data D --output S`."""

import sys
import time
from pathlib import Path

if __name__ == "__main__":  # `python jobs/score.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.config import ScoreConfig
from jobs import cli


def main(argv: list[str] | None = None) -> int:
    return cli.run(ScoreConfig, score_with_progress, argv, show=show_score, prog="alphatoken score")


def score_with_progress(config: ScoreConfig, total_rows: int | None = None) -> dict:
    """Run the pipeline with a progress line on terminals; `total_rows` gives it a remaining time."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from pipelines.score import run_score  # imports Ray and torch: not before the arguments are right

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting (model, direction)", total=total_rows)
        begun: list[tuple[float, int]] = []

        def advance(counts: dict) -> None:
            begun.append((time.monotonic(), counts["tokens"]))
            (start, first), (now, tokens) = begun[0], begun[-1]
            rate = f", {(tokens - first) / (now - start):,.0f} tokens/s" if now > start else ""
            refused = f", {counts['rows_quarantined']} in quarantine" if counts["rows_quarantined"] else ""
            bar.update(
                task, completed=counts["rows_in"], description=f"scored {counts['rows_out']} rows{refused}{rate}"
            )

        return run_score(config, advance)


def show_score(config: ScoreConfig, manifest: dict) -> None:
    """What came out, for people."""
    from rich.console import Console
    from rich.table import Table

    counts = manifest["counts"]
    table = Table(show_header=False, box=None)
    table.add_row("scored data set", config.output)
    table.add_row("rows", f"{counts['rows_out']:,} of {counts['rows_in']:,}")
    table.add_row("response tokens", f"{counts['response_tokens']:,} of {counts['tokens']:,}")
    if counts["rows_truncated"]:
        table.add_row("truncated", f"{counts['rows_truncated']:,} rows, at {config.max_length} tokens")
    if counts["rows_quarantined"]:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in list(counts["quarantine_reasons"].items())[:3])
        table.add_row("quarantined", f"{counts['rows_quarantined']:,} ({reasons}); see quarantine/")
    table.add_row("time", f"{manifest['seconds']:.0f} s")
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    sys.exit(main())
