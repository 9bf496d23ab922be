"""Wall-clock of training in rounds over plain training, sequential and overlapped, and where the time goes.

    python benchmarks/rounds_speed.py [--steps 36] [--json FILE]

Three runs of `run_rounds` on the same rows, one after the other, each with its own start of workers and actors: all
steps plain; a refresh every 12 steps with one actor; the same with two actors that overlap with the trainer. On one
machine trainer and actors share its cores: overlapping gains where they do not.
"""

import argparse
import json
import tempfile
from pathlib import Path

from common import DATA_HELP, embedded_file, print_table, write_result

from alphatoken.config import EMBEDDED_MODEL
from alphatoken.rounds_config import RoundsConfig
from pipelines.rounds import run_rounds
from pipelines.train import read_metrics


def configuration(arguments: argparse.Namespace, output: str, **changes) -> RoundsConfig:
    settings = {
        "model": arguments.model, "data": [arguments.data], "validation": [arguments.validation], "output": output,
        "max_steps": arguments.steps, "per_device_batch_size": arguments.batch_size, "dtype": arguments.dtype,
        "refresh_every": arguments.refresh_every, "plain_steps": 12, "save_steps": 10**6, "rule": "share",
    }  # fmt: skip
    return RoundsConfig(**(settings | changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data", help=DATA_HELP, default=embedded_file("train.jsonl"))
    parser.add_argument("--validation", help=DATA_HELP, default=embedded_file("validation.jsonl"))
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--refresh-every", type=int, default=12)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    oldest = 2 * arguments.refresh_every - 1
    modes = {
        "plain": {"plain_steps": arguments.steps},
        "rounds, 1 actor": {"max_staleness": arguments.refresh_every - 1},
        "rounds, 2 actors, overlapped": {"overlap": True, "num_actors": 2, "max_staleness": oldest},
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, changes) in enumerate(modes.items()):
            output = f"{folder}/{number}"
            manifest = run_rounds(configuration(arguments, output, **changes))
            last = read_metrics(f"{output}/metrics.jsonl")[-1]
            ages = [json.loads(p.read_text())["oldest_values"] for p in Path(output).glob("windows/*/window.json")]
            results[name] = {
                "seconds": last["train_runtime"],
                "with_start_and_export": manifest["seconds"],
                "rounds": manifest["rounds"],
                "oldest_values": max(ages, default=0),
            }
    plain = results["plain"]["seconds"]
    stages = ["direction", "score", "mask", "trainer_publish", "trainer_wait"]
    print_table(
        f"{arguments.steps} steps of {arguments.batch_size} rows, after 12 plain ones a refresh every "
        f"{arguments.refresh_every}; stages as shares of the training's wall-clock",
        ["", "training, s", "x plain", *(stage.replace("_", " ") for stage in stages), "oldest values, steps"],
        [
            [name, f"{r['seconds']:.0f}", f"{r['seconds'] / plain:.2f}",
             *(f"{r['rounds']['seconds'].get(stage, 0.0) / r['seconds']:.0%}" for stage in stages),
             str(r["oldest_values"])]
            for name, r in results.items()
        ],
    )  # fmt: skip
    write_result(arguments.json, vars(arguments) | {"results": results})


if __name__ == "__main__":
    main()
