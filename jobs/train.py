"""SFT or DPO on masked data: `alphatoken train --data MASKED --model M --output OUT [--objective dpo] [--in-run]`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":  # `python jobs/train.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.train_config import TrainConfig
from jobs import cli

SHOWN = (
    "loss", "eval_loss", "grad_norm", "learning_rate", "rewards/margins", "kept_fraction", "values_age",
    "skipped_batches",
)  # fmt: skip


CONFIG = TrainConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _train, argv, show=show_training, prog="alphatoken train")


def _train(config: TrainConfig) -> dict:
    from pipelines.train import run_train  # imports Ray and torch: not before the arguments are right

    with training_bar(config) as progress:
        return run_train(config, progress)


@contextmanager
def training_bar(config: TrainConfig) -> Iterator[Callable[[dict], None]]:
    """The function that it gives is told every line of metrics: shown on stderr, above the bar where one is drawn."""
    from jobs.progress import progress_bar

    with progress_bar("steps") as bar:

        def progress(line: dict) -> None:
            if any(name in line for name in SHOWN):  # the last line of a run has only its totals
                bar.print(_text(line))
            epoch = line.get("epoch")
            total = config.max_steps or (round(line["step"] * config.epochs / epoch) if epoch else None)
            bar.update("training", line["step"], total)

        yield progress


def _text(line: dict) -> str:
    shown = [f"{name} {'not finite' if line[name] is None else f'{line[name]:.4g}'}" for name in SHOWN if name in line]
    return f"step {line['step']} (epoch {line.get('epoch', 0):.2f})  " + "  ".join(shown)


def show_training(config: TrainConfig, manifest: dict) -> None:
    """What came out, for people."""
    from rich.console import Console
    from rich.table import Table

    counts = manifest["counts"]
    table = Table(show_header=False, box=None)
    table.add_row("model", f"{config.output.rstrip('/')}/model")
    if config.lora_rank:
        table.add_row("adapter", f"{config.output.rstrip('/')}/adapter")
    table.add_row("steps", f"{counts['steps']:,} ({counts.get('epoch', 0):.2f} epochs of {counts['rows']:,} rows)")
    for name in ("train_loss", "eval_loss"):
        if name in counts:
            table.add_row(name.replace("_", " "), "not finite" if counts[name] is None else f"{counts[name]:.4f}")
    if counts.get("skipped_batches"):
        table.add_row("skipped steps", f"{counts['skipped_batches']:,} (no token kept)")
    rounds = manifest.get("rounds")
    if rounds:
        table.add_row("windows", f"{rounds['windows']:,}, values at most {rounds['oldest_values']} steps old")
        table.add_row("kept", f"{rounds['kept_fraction']:.1%} of the response tokens in them")
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.0f} s" for name, value in rounds["seconds"].items())
        table.add_row("of the time", shown)
    table.add_row("time", f"{manifest['seconds']:.0f} s")
    Console(soft_wrap=True, markup=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
