"""The main job on what ships with the package, `alphatoken demo`: score, mask, look, train in rounds and compare."""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # `python jobs/demo.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.config import EMBEDDED_MODEL, DemoConfig, ScoreConfig, embedded_data, embedded_rows
from alphatoken.evaluate_config import EvaluateConfig
from alphatoken.mask_config import MaskConfig
from alphatoken.rounds_config import RoundsConfig
from jobs import cli

SHOWN_ROWS = 2
VALIDATION_ROWS = 16
HELD_OUT_ROWS = 12
# Enough to see the flow in minutes on two cores.
TRAINING = {"per_device_batch_size": 2, "learning_rate": 2e-5, "logging_steps": 4}


CONFIG = DemoConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _demo, argv, show=_show, prog="alphatoken demo")


def _demo(config: DemoConfig) -> dict:
    """Score a part of the embedded data and mask it, then train on it in rounds and plainly; returns what came out."""
    if config.preference:
        from jobs.demo_preference import run_preference

        return run_preference(config, _say)
    from alphatoken.row_view import read_rows
    from jobs.score import score_with_progress
    from pipelines.mask import run_mask

    folder = Path(config.output)
    data = embedded_rows("train.jsonl", config.rows, folder / "data.jsonl")
    validation = [embedded_rows("validation.jsonl", VALIDATION_ROWS, folder / "validation.jsonl")]
    _say("1. How much is each response token worth? Scoring with the model as it is.")
    scored = score_with_progress(
        ScoreConfig(
            model=EMBEDDED_MODEL,
            data=[data],
            validation=validation,
            output=str(folder / "scored"),
            overwrite=config.overwrite,
        ),
    )
    masked_folder = str(folder / "masked")
    masked = run_mask(MaskConfig(input=str(folder / "scored"), output=masked_folder, overwrite=config.overwrite))
    result = {
        "masked": masked_folder,
        "seconds": {"score": scored["seconds"], "mask": masked["seconds"]},
        "counts": masked["counts"],
        "rows": read_rows(masked_folder, [], SHOWN_ROWS),
    }
    return result | (_train(config, data, validation, folder) if config.steps else {})


def _train(config: DemoConfig, data: str, validation: list[str], folder: Path) -> dict:
    """The same steps on every token and in rounds; losses of both models and of the one before."""
    from jobs.train import training_bar
    from pipelines.evaluate import run_evaluate
    from pipelines.rounds import run_rounds

    models, seconds = [EMBEDDED_MODEL], {}
    half = max(1, config.steps // 2)
    for name, plain_steps in (("plain", config.steps), ("rounds", half)):
        words = "on every token" if name == "plain" else f"in rounds: values again every {half} steps, suspects dropped"
        _say(f"{len(models) + 1}. Training {config.steps} steps {words}.")
        rounds = RoundsConfig(
            model=EMBEDDED_MODEL,
            data=[data],
            validation=validation,
            output=str(folder / name),
            max_steps=config.steps,
            plain_steps=plain_steps,
            refresh_every=half,
            rule="suspect",
            overwrite=config.overwrite,
            **TRAINING,
        )
        with training_bar(rounds) as progress:
            manifest = run_rounds(rounds, progress)
        seconds[name] = manifest["seconds"]
        models.append(str(folder / name / "model"))
    _say("4. Held-out losses, before and after.")
    target, general = (str(embedded_data() / name) for name in ("evaluation.jsonl", "general.jsonl"))
    found = run_evaluate(
        EvaluateConfig(model=models, loss={"target": target, "general text": general}, limit=HELD_OUT_ROWS)
    )
    return {"models": models, "training_seconds": seconds, "measures": found["measures"]}


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(f"[bold]{text}[/bold]")


def _show(config: DemoConfig, result: dict) -> None:
    if config.preference:
        from jobs.demo_preference import show_preference

        return show_preference(result)
    from rich.console import Console

    from jobs.show import print_rows

    console = Console(soft_wrap=True)
    print_rows(result)
    counts = result["counts"]
    console.rule()
    console.print("green: training on the token helps the target; red: it hurts; struck out: dropped from the loss")
    rows, tokens = counts["rows_out"] + counts["rows_dropped_sequences"], counts["response_tokens"]
    console.print(f"kept {counts['kept_fraction']:.1%} of {tokens:,} response tokens in {rows} rows")
    if counts["kept_fraction"] == 1:
        console.print(
            "nothing is suspect in these clean rows; drop the lowest fifth by value instead: "
            f"alphatoken mask --input {config.output}/scored --output {config.output}/share --keep-fraction 0.8"
        )
    console.print(f"token-masked data set: {result['masked']} (input_ids and labels: trainers take it as it is)")
    console.print(f"look further: alphatoken show {result['masked']}")
    if "measures" in result:
        _show_training(config, result, console)


def _show_training(config: DemoConfig, result: dict, console: Any) -> None:
    from rich.table import Table

    console.rule()
    table = Table("held-out loss", "before", "every token", "in rounds", box=None)
    for line in result["measures"]:
        if line["measure"] == "loss":
            table.add_row(line["file"], *(f"{value['value']:.4f}" for value in line["values"]))
    console.print(table)
    plain, rounds = result["training_seconds"].values()
    console.print(
        f"{config.steps} steps each ({plain:.0f} s and {rounds:.0f} s). So few steps on clean rows show that it runs, "
        "not which is better: README, What we know."
    )
    console.print(f"the model trained in rounds: {result['models'][-1]}")


if __name__ == "__main__":
    sys.exit(main())
