"""What the pipeline adds to the computation: `run_score` against a bare loop over the same rows.

    python benchmarks/ray_overhead.py [--rows 1280] [--num-actors 2] [--json FILE]

Both start cold in a process of their own: load the model, make the direction, encode, score, write Parquet. The
pipeline's time includes starting Ray. Both have all of the machine's cores: the loop as threads of one process, the
pipeline as actors that share the cores out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from common import embedded_file, print_table, write_result

from alphatoken.config import EMBEDDED_MODEL, ScoreConfig


def configuration(data: str, folder: str, num_actors: str) -> ScoreConfig:
    return ScoreConfig(
        model=EMBEDDED_MODEL, data=[data], validation=[embedded_file("validation.jsonl")], output=f"{folder}/scored",
        num_actors=num_actors,
    )  # fmt: skip


def bare_loop(config: ScoreConfig) -> None:
    """The library without Ray: one process, one pass."""
    import pyarrow as pa

    from alphatoken.model import load_model
    from alphatoken.model_encoder import make_encoder
    from alphatoken.scoring import build_estimator, score_table
    from alphatoken.sources import plan_units, read_unit
    from alphatoken.storage import write_table
    from pipelines.cluster import prepare_worker, torch_threads
    from pipelines.direction import make_direction
    from pipelines.encode import EncodePlan, encode_row, row_columns
    from pipelines.score import shard_tokens

    prepare_worker(torch_threads())  # the process's settings are the same on both sides
    scoring = load_model(config.model)
    direction = f"{config.output}-direction.safetensors"
    make_direction(scoring, config, "all-linear", "all", direction)
    estimator = build_estimator(config, scoring, direction)
    encoder = make_encoder(config.model, config)
    schema = EncodePlan(config.model, False, config).arrow_schema
    units = plan_units(config.data)
    limit, block, tokens = shard_tokens(config, units), [], 0
    records = [encode_row(row, row_columns(encoder)) for unit in units for row in read_unit(unit)]
    for number, record in enumerate(records):
        block.append(record)
        tokens += len(record["input_ids"])
        if tokens >= limit or number == len(records) - 1:
            table = pa.Table.from_pylist(block, schema=schema)
            scored, _, _ = score_table(table, estimator, config.batch_tokens, scoring.device)
            write_table(scored, f"{config.output}-bare/train-{number:015d}.parquet")
            block, tokens = [], 0


def timed(mode: str, data: str, folder: str, num_actors: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--run", mode, data, folder, num_actors], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1280, help="more than the embedded set has: it is repeated")
    parser.add_argument("--num-actors", default="2")
    parser.add_argument("--json")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        mode, *rest = arguments.run
        if mode == "bare":
            bare_loop(configuration(*rest))
        else:
            from pipelines.score import run_score

            run_score(configuration(*rest))
        return
    embedded = Path(embedded_file("train.jsonl")).read_text().splitlines(keepends=True)
    lines = list(islice(cycle(embedded), arguments.rows))
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data.jsonl"
        Path(data).write_text("".join(lines))
        bare = timed("bare", data, folder, arguments.num_actors)
        pipeline = timed("pipeline", data, folder, arguments.num_actors)
        counts = json.loads(Path(folder, "scored", "manifest.json").read_text())["counts"]
    print_table(
        f"{counts['rows_out']} rows, {counts['tokens']:,} tokens, exact over all linear weights",
        ["", "seconds", "x bare loop"],
        [
            ["bare loop", f"{bare:.1f}", "1.00"],
            [f"pipeline (Ray, cold start, {arguments.num_actors} actors)", f"{pipeline:.1f}", f"{pipeline / bare:.3f}"],
        ],
    )
    write_result(
        arguments.json,
        {
            "rows": arguments.rows,
            "num_actors": arguments.num_actors,
            "bare_seconds": bare,
            "pipeline_seconds": pipeline,
            "ratio": pipeline / bare,
            "scoring_seconds_in_actors": counts["scoring_seconds"],
        },
    )


if __name__ == "__main__":
    main()
