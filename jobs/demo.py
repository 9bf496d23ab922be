"""The main job on what ships with the package: score, mask and look at real text by a real model, `alphatoken demo`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/demo.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.config import EMBEDDED_MODEL, DemoConfig, MaskConfig, ScoreConfig, embedded_data
from jobs import cli

VALIDATION_ROWS = 32
SHOWN_ROWS = 2


def main(argv: list[str] | None = None) -> int:
    return cli.run(DemoConfig, _demo, argv, show=_show, prog="alphatoken demo")


def _demo(config: DemoConfig) -> dict:
    """Score a part of the embedded data, mask it; returns both manifests and rows to look at."""
    from jobs.score import score_with_progress
    from jobs.show import read_rows
    from pipelines.mask import run_mask

    folder = Path(config.output)
    data = _first_rows(embedded_data() / "train.jsonl", config.rows, folder / "data.jsonl")
    scored = score_with_progress(
        ScoreConfig(
            model=EMBEDDED_MODEL,
            data=[str(data)],
            validation=[str(embedded_data() / "validation.jsonl")],
            output=str(folder / "scored"),
            overwrite=config.overwrite,
        ),
        total_rows=config.rows,
    )
    masked_folder = str(folder / "masked")
    masked = run_mask(MaskConfig(input=str(folder / "scored"), output=masked_folder, overwrite=config.overwrite))
    return {
        "masked": masked_folder,
        "seconds": {"score": scored["seconds"], "mask": masked["seconds"]},
        "counts": masked["counts"],
        "rows": read_rows(masked_folder, [], SHOWN_ROWS),
    }


def _first_rows(source: Path, count: int, target: Path) -> Path:
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(lines), encoding="utf-8")
    return target


def _show(config: DemoConfig, result: dict) -> None:
    from rich.console import Console

    from jobs.show import print_rows

    console = Console(soft_wrap=True)
    print_rows(result)
    counts = result["counts"]
    console.rule()
    console.print("green: training on the token helps the target; red: it hurts; struck out: dropped from the loss")
    rows, tokens = counts["rows_out"], counts["response_tokens"]
    console.print(f"kept {counts['kept_fraction']:.1%} of {tokens:,} response tokens in {rows} rows")
    console.print(f"token-masked data set: {result['masked']} (input_ids and labels: trainers take it as it is)")
    console.print(f"look further: alphatoken show {result['masked']}")


if __name__ == "__main__":
    sys.exit(main())
