"""How time and memory grow: with length, with validation rows, with rows, and with one or two actors.

    python benchmarks/growth.py [--lengths 256 512 1024 2048 4096 8192] [--json FILE]

Length: one row of real text, half of it response, each length in a process of its own; memory is the peak above the
loaded model. Linear growth: time per token and memory per token stay. Validation rows: the direction is made from so
many rows, then the same batch is scored. Rows and actors: the pipeline's scoring on two cores, Ray's start left out.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import speed
import torch
from common import (
    DATA_HELP,
    embedded_file,
    encoded_rows,
    in_own_process,
    packed_batch,
    peak_mb_of,
    print_table,
    write_result,
)

from alphatoken.config import EMBEDDED_MODEL, ScoreConfig
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.exact import Exact
from alphatoken.model import load_model
from alphatoken.value_propagation import ValuePropagation

METHODS = ("forward pass", "value_propagation, K = 3", "exact, K = 3", "exact, all-linear")
PARTS = ("lengths", "validation", "runs")
VALIDATION_ROWS = (4, 16, 64)
ROWS = (128, 256, 512)
REPEATS = 3


def at_length(model: str, data: str, length: int, method: str) -> dict:
    """Seconds and peak memory of one row."""
    rows = encoded_rows(model, [data])
    scoring = load_model(model, "float32")
    batch = packed_batch(rows, 1, length).to(scoring.device)
    small = packed_batch(rows[::-1], 2, 128).to(scoring.device)
    parameters = speed.K3 if "K = 3" in method else speed.ALL
    if method == "forward pass":
        call: Callable = speed.forward_pass(scoring, batch)
    else:
        direction = mean_gradient(scoring, [small], GradientOptions(parameters)).tensors
        estimator = (
            ValuePropagation(scoring, parameters, direction)
            if method.startswith("value")
            else Exact(scoring, parameters, direction)
        )
        call = lambda: estimator(batch)  # noqa: E731
    seconds: list[float] = []
    peak = peak_mb_of(lambda: seconds.extend(times_of(call, REPEATS if length <= 2048 else 1)))
    return {"length": length, "method": method, "seconds": min(seconds), "peak_mb": peak}


def times_of(call: Callable[[], object], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def with_validation_rows(model: str, data: str, validation: str, count: int) -> dict:
    """Seconds of scoring a batch along a direction from `count` rows, and of making it."""
    scoring = load_model(model, "float32")
    batch = packed_batch(encoded_rows(model, [data]), 4, 256).to(scoring.device)
    known = list(itertools.islice(itertools.cycle(encoded_rows(model, [validation])), count))
    parts = [packed_batch(known[i : i + 4], 4, 128).to(scoring.device) for i in range(0, count, 4)]
    started = time.perf_counter()
    direction = mean_gradient(scoring, parts, GradientOptions(speed.ALL)).tensors
    made = time.perf_counter() - started
    estimator = Exact(scoring, speed.ALL, direction)
    seconds = times_of(lambda: estimator(batch), REPEATS + 1)
    return {"validation_rows": count, "scoring_seconds": min(seconds), "direction_seconds": made}


def pipeline(
    model: str, data: str, direction: str | None, validation: str, rows: int, actors: int, folder: str
) -> dict:
    """Rows per second once the actors are at work, each on one thread."""
    import ray

    import pipelines.score as score

    score.torch_threads = lambda *_: 1  # the only actor of one would take both cores
    lines = Path(data).read_text().splitlines(keepends=True)
    path = Path(folder) / f"rows-{rows}-{actors}.jsonl"
    path.write_text("".join(itertools.islice(itertools.cycle(lines), rows)))
    inputs = {"direction": direction} if direction else {"validation": [validation]}
    config = ScoreConfig(
        model=model, data=[str(path)], output=f"{folder}/scored-{rows}-{actors}", num_actors=str(actors),
        shard_tokens=2048, **inputs,
    )  # fmt: skip
    at: list[tuple[float, int]] = []
    score.run_score(config, lambda counts: at.append((time.monotonic(), counts["rows_in"])))
    ray.shutdown()  # in order, or its threads complain when this process ends
    first, last = at[actors - 1], at[-1]  # each actor's first shard has its loading before it
    return {
        "rows": rows, "actors": actors, "rows_per_second": (last[1] - first[1]) / (last[0] - first[0]),
        "direction": f"{config.output}/direction.safetensors",
    }  # fmt: skip


def lengths_part(model: str, data: str, lengths: list[int]) -> list[dict]:
    found = [in_own_process(at_length, model, data, length, method) for method in METHODS for length in lengths]
    print_table(
        "one row, float32",
        ["method", "T", "s", "ms per token", "peak MB", "KB per token"],
        [[x["method"], str(x["length"]), f"{x['seconds']:.2f}", f"{1e3 * x['seconds'] / x['length']:.2f}",
          f"{x['peak_mb']:,.0f}", f"{1024 * x['peak_mb'] / x['length']:,.0f}"] for x in found],
    )  # fmt: skip
    return found


def validation_part(model: str, data: str, validation: str) -> list[dict]:
    found = [in_own_process(with_validation_rows, model, data, validation, count) for count in VALIDATION_ROWS]
    print_table(
        "validation rows",
        ["validation rows", "scoring a batch, s", "making the direction, s"],
        [[str(x["validation_rows"]), f"{x['scoring_seconds']:.2f}", f"{x['direction_seconds']:.1f}"] for x in found],
    )
    return found


def rows_part(model: str, data: str, validation: str, rows: list[int]) -> list[dict]:
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for count, actors in [*((count, 2) for count in rows), (rows[-1], 1)]:
            direction = runs[0]["direction"] if runs else None
            runs.append(in_own_process(pipeline, model, data, direction, validation, count, actors, folder))
    for run in runs:
        del run["direction"]
    print_table(
        "rows and actors (each actor has one core)",
        ["rows", "actors", "rows/s"],
        [[str(x["rows"]), str(x["actors"]), f"{x['rows_per_second']:.2f}"] for x in runs],
    )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data", help=DATA_HELP, default=embedded_file("train.jsonl"))
    parser.add_argument("--validation", help=DATA_HELP, default=embedded_file("validation.jsonl"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the rest stays as FILE has it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="128 or more: rates are of later shards")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model, data, validation = arguments.model, arguments.data, arguments.validation
    measure: dict[str, Callable[[], list[dict]]] = {
        "lengths": lambda: lengths_part(model, data, arguments.lengths),
        "validation": lambda: validation_part(model, data, validation),
        "runs": lambda: rows_part(model, data, validation, arguments.rows),
    }
    found = json.loads(Path(arguments.json).read_text()) if arguments.json and Path(arguments.json).exists() else {}
    found |= {name: measure[name]() for name in arguments.parts}
    write_result(arguments.json, found | {"model": model, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
