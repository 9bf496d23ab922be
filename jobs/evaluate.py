"""Models before and after, on named files: `alphatoken evaluate --model BEFORE AFTER --loss task=FILE`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/evaluate.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.evaluate_config import EvaluateConfig
from jobs import cli

PERCENT = ("accuracy", "accuracy_normalized")


CONFIG = EvaluateConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _evaluate, argv, show=show_measures, prog="alphatoken evaluate")


def _evaluate(config: EvaluateConfig) -> dict:
    from alphatoken.row_count import count_rows
    from jobs.progress import progress_bar
    from pipelines.evaluate import run_evaluate  # imports Ray and torch: not before the arguments are right

    with progress_bar("rows") as bar:
        if not bar.drawn:
            return run_evaluate(config)
        counts = [count_rows([path], config.limit) for _, _, path in config.files]
        total = None if None in counts else len(config.model) * sum(filter(None, counts))
        return run_evaluate(config, lambda what, done: bar.update(f"{what} evaluated", done, total))


def show_measures(config: EvaluateConfig, result: dict) -> None:
    """The table for people: a line per measure, a column per model; what was left out below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", *_short_names(config.model), *["difference"] * (len(config.model) == 2), box=None)
    for line in result["measures"]:
        numbers = [_shown(number, line["measure"]) for number in line["values"]]
        if "difference" in line:
            numbers.append(_shown(line["difference"], line["measure"], sign="+"))
        table.add_row(f"{line['file']}: {line['measure'].replace('_', ' ')}", *numbers)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    for file in result["files"]:
        notes = [f"{file[key]} {text}" for key, text in NOTES.items() if file.get(key)]
        if notes:
            console.print(f"{file['file']}, {file['model']}: {file['rows']} rows used; {'; '.join(notes)}")
    if config.output:
        console.print(f"written to {config.output}")


NOTES = {
    "rows_refused": "left out (reasons in the JSON output)",
    "rows_truncated": "truncated at --max-length",
    "answers_cut": "answers cut at --max-new-tokens",
}


def _short_names(models: list[str]) -> list[str]:
    """The last part of each path where that tells the models apart."""
    short = [model.rstrip("/").rsplit("/", 1)[-1] for model in models]
    return short if len(set(short)) == len(models) else models


def _shown(number: dict, measure: str, sign: str = "") -> str:
    """`1.2345 ± 0.0123`; accuracies in percent."""
    value, error = number["value"], number["standard_error"]
    if value is None:
        return "not finite"
    scale, digits, unit = (100, 1, " %") if measure in PERCENT else (1, 4, "")
    text = f"{value * scale:{sign},.{digits}f}"
    return text + ("" if error is None else f" ± {error * scale:,.{digits}f}") + unit


if __name__ == "__main__":
    sys.exit(main())
