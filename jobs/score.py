"""Adaptation and stability of every response token: `alphatoken score --model M --validation V --data D --output S`."""

import sys
import time
from pathlib import Path

if __name__ == "__main__":  # `python jobs/score.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.config import ScoreConfig
from jobs import cli

CONFIG = ScoreConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, score_with_progress, argv, show=show_score, prog="alphatoken score")


def score_with_progress(config: ScoreConfig) -> dict:
    """Run the pipeline, with a progress bar on terminals."""
    from alphatoken.row_count import count_rows
    from jobs.progress import progress_bar, rate
    from pipelines.score import run_score  # imports Ray and torch: not before the arguments are right

    with progress_bar("rows") as bar:
        if not bar.drawn:
            return run_score(config)
        total = count_rows(config.data)
        bar.update("starting: model, direction", 0, total)
        begun: list[tuple[float, int]] = []

        def advance(counts: dict) -> None:
            begun.append((time.monotonic(), counts["tokens"]))
            (start, first), (now, tokens) = begun[0], begun[-1]
            speed = rate((tokens - first) / (now - start), "tokens") if now > start else ""
            refused = f"{counts['rows_quarantined']} in quarantine" if counts["rows_quarantined"] else ""
            bar.update(", ".join(filter(None, ["scored", refused, speed])), counts["rows_in"], total)

        return run_score(config, advance, lambda what, done: bar.update(f"direction: {what}", done))


def show_score(config: ScoreConfig, manifest: dict) -> None:
    """What came out, for people."""
    from rich.console import Console
    from rich.table import Table

    from alphatoken.manifest import told_reasons

    counts = manifest["counts"]
    table = Table(show_header=False, box=None)
    table.add_row("scored data set", config.output)
    table.add_row("rows", f"{counts['rows_out']:,} of {counts['rows_in']:,}")
    table.add_row("response tokens", f"{counts['response_tokens']:,} of {counts['tokens']:,}")
    if counts["rows_truncated"]:
        table.add_row("truncated", f"{counts['rows_truncated']:,} rows, to what --max-length and the model allow")
    if counts.get("rows_special_tokens"):
        table.add_row("special tokens", f"{counts['rows_special_tokens']:,} rows have some in their text")
    if counts["rows_quarantined"]:
        reasons = told_reasons(counts["quarantine_reasons"])
        table.add_row("quarantined", f"{counts['rows_quarantined']:,} ({reasons}); see quarantine/")
    table.add_row("time", f"{manifest['seconds']:.0f} s")
    Console(soft_wrap=True, markup=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
