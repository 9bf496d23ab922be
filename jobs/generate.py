"""Fresh responses to prompts: `alphatoken generate --model M --prompts P --output R --samples 8`."""

import sys
import time
from pathlib import Path

if __name__ == "__main__":  # `python jobs/generate.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.generate_config import GenerateConfig
from jobs import cli

CONFIG = GenerateConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, generate_with_progress, argv, show=_show, prog="alphatoken generate")


def generate_with_progress(config: GenerateConfig) -> dict:
    """Run the pipeline, with a progress bar on terminals."""
    from alphatoken.row_count import count_rows
    from jobs.progress import progress_bar, rate
    from pipelines.generate import run_generate  # imports Ray and torch: not before the arguments are right

    with progress_bar("prompts") as bar:
        if not bar.drawn:
            return run_generate(config)
        total, started = count_rows(config.prompts, config.limit), time.monotonic()

        def advance(counts: dict) -> None:
            speed = rate(counts["response_tokens"] / (time.monotonic() - started), "tokens")
            bar.update(f"{counts['rows_out']:,} responses, {speed}", counts["prompts"], total)

        return run_generate(config, advance)


def _show(config: GenerateConfig, manifest: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    from alphatoken.manifest import told_reasons

    counts = manifest["counts"]
    table = Table(show_header=False, box=None)
    table.add_row("responses", config.output)
    table.add_row("engine", manifest["engine"])
    table.add_row("rows", f"{counts['rows_out']:,} responses to {counts['prompts']:,} prompts")
    table.add_row("tokens", f"{counts['response_tokens']:,} in responses")
    if counts["responses_cut"]:
        table.add_row("cut", f"{counts['responses_cut']:,} at {config.max_new_tokens} tokens")
    if counts["rows_quarantined"]:
        reasons = told_reasons(counts["quarantine_reasons"])
        table.add_row("quarantined", f"{counts['rows_quarantined']:,} ({reasons}); see quarantine/")
    table.add_row("time", f"{manifest['seconds']:.0f} s")
    Console(soft_wrap=True, markup=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
