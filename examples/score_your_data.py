"""Score a file, mask it, and write a report: what `alphatoken score`, `mask` and `report` do, from Python.

    python examples/score_your_data.py                                     # the embedded model and some embedded rows
    python examples/score_your_data.py --model M --data train.jsonl --validation target.jsonl --output runs/mine

Open OUTPUT/report.html in a browser.
"""

import argparse
import logging
from pathlib import Path

from alphatoken.config import EMBEDDED_MODEL, ScoreConfig, embedded_rows
from alphatoken.mask_config import MaskConfig
from alphatoken.report import report_page
from alphatoken.report_data import report_data
from pipelines.mask import run_mask
from pipelines.score import run_score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder or hub name")
    parser.add_argument("--data", help="rows to score; default: 16 embedded ones")
    parser.add_argument("--validation", help="rows of the target task; default: 12 embedded ones")
    parser.add_argument("--output", default="runs/example-score", help="folder for everything that is written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(arguments.output)

    # Rows in, values out. The same command again goes on where it was cut off, or returns at once.
    scored = run_score(
        ScoreConfig(
            model=arguments.model,
            data=[arguments.data or embedded_rows("train.jsonl", 16, folder / "train.jsonl")],
            validation=[arguments.validation or embedded_rows("validation.jsonl", 12, folder / "validation.jsonl")],
            output=str(folder / "scored"),
        )
    )
    # Drops suspects; other rules (keep_fraction=0.8) need no scoring either: a mask is derived from stored values.
    masked = run_mask(MaskConfig(input=str(folder / "scored"), output=str(folder / "masked")))
    page = folder / "report.html"
    found = report_data(str(folder / "masked"), num_rows=200, seed=0, group_by=None, compare=None)
    page.write_text(report_page(found, str(folder / "masked")), encoding="utf-8")

    counts = scored["counts"]
    print(f"{counts['rows_out']} of {counts['rows_in']} rows scored; what is left out is in quarantine/")
    counts = masked["counts"]
    print(f"{counts['kept_tokens']} of {counts['response_tokens']} response tokens kept")
    print(f"open {page} in a browser")


if __name__ == "__main__":
    main()
