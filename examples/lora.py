"""Train a LoRA adapter in rounds: plain steps first, then windows of rows valued with the weights of the moment.
Then value the rows for the step after: along the adapter's own factors.

    python examples/lora.py                                                # a few steps on embedded rows

A few steps on few rows show that it runs, not that it helps: compare with `--rule none` on data of your own.
"""

import argparse
import logging
from pathlib import Path

from alphatoken.config import EMBEDDED_MODEL, ScoreConfig, embedded_rows
from alphatoken.rounds_config import RoundsConfig
from pipelines.rounds import run_rounds
from pipelines.score import run_score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder or hub name")
    parser.add_argument("--data", help="training rows; default: 16 embedded ones")
    parser.add_argument("--validation", help="rows of the target task; default: 8 embedded ones")
    parser.add_argument("--rule", default="suspect", help="what is left out; none: the control")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--output", default="runs/example-lora", help="folder for everything that is written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(arguments.output)
    rows = folder / "rows"

    data = [arguments.data or embedded_rows("train.jsonl", 16, rows / "train.jsonl")]
    validation = [arguments.validation or embedded_rows("validation.jsonl", 8, rows / "validation.jsonl")]
    manifest = run_rounds(
        RoundsConfig(
            model=arguments.model,
            data=data,
            validation=validation,
            output=str(folder / "run"),
            rule=arguments.rule,
            lora_rank=arguments.rank,
            # The optimizer has second moments of the adapter only, so the direction goes without them.
            preconditioner="none",
            plain_steps=4,
            refresh_every=4,
            per_device_batch_size=2,
            learning_rate=2e-4,
        ),
        progress=lambda line: print({name: line[name] for name in ("step", "loss", "values_age") if name in line}),
    )
    print(f"kept {manifest['rounds']['kept_fraction']:.1%} of the response tokens that were valued")
    adapter = folder / "run" / "adapter"
    print(f"adapter: {adapter}")
    print(f"merged into the weights: {folder / 'run' / 'model'}")

    # In rounds values are about the merged weights. These are about what LoRA trains.
    scored = run_score(
        ScoreConfig(
            model=str(adapter), parameters="lora", data=data, validation=validation, output=str(folder / "scored")
        )
    )
    print(f"{scored['counts']['rows_out']} rows valued along the adapter's factors: {folder / 'scored'}")


if __name__ == "__main__":
    main()
