"""How fast masking is: the per-shard function on one core, then the whole Ray job.

    python benchmarks/mask_speed.py --rows 1000000 --json runs/mask_speed.json

Values are random; rows have 50 to 150 response tokens after a prompt of 20.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # `python benchmarks/mask_speed.py`: the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from alphatoken import schema, storage
from alphatoken.mask_config import MaskConfig
from alphatoken.masking import MaskPlan, mask_table

PROMPT, SHORTEST, LONGEST = 20, 50, 150
VOCABULARY = 49_152
# What a person chooses -> how it is measured on one core, where one shard at a time decides.
SETTINGS = {"sequence": {}, "dataset": {"threshold": 0.0}, "weights": {"weights": True}}


def scored_shard(random: np.random.Generator, first_row_id: int, num_rows: int) -> pa.Table:
    lengths = PROMPT + random.integers(SHORTEST, LONGEST + 1, size=num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    size = int(offsets[-1])
    inside = np.arange(size) - np.repeat(offsets[:-1], lengths) >= PROMPT
    streams = [random.standard_normal(size, dtype=np.float32) * inside for _ in range(3)]
    adaptation, stability, logprobs = streams
    means = [np.add.reduceat(stream, offsets[:-1]) / (lengths - PROMPT) for stream in streams]

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))

    row_ids = first_row_id + np.arange(num_rows)
    columns = {
        "row_id": row_ids,
        "id": [f"bench:{row_id}" for row_id in row_ids],
        "input_ids": lists(random.integers(0, VOCABULARY, size=size, dtype=np.int32), pa.int32()),
        "response_mask": lists(inside, pa.bool_()),
        "truncated": np.zeros(num_rows, dtype=bool),
        "adaptation": lists(adaptation, pa.float32()),
        "stability": lists(stability, pa.float32()),
        "logprobs": lists(logprobs, pa.float32()),
        "num_response_tokens": (lengths - PROMPT).astype(np.int32),
        "mean_adaptation": means[0].astype(np.float32),
        "mean_stability": means[1].astype(np.float32),
        "mean_loss": -means[2].astype(np.float32),
    }
    return pa.table(columns, schema=schema.SCORED)


def write_folder(folder: str, num_rows: int, shard_rows: int) -> list[str]:
    random = np.random.default_rng(0)
    for first in range(0, num_rows, shard_rows):
        table = scored_shard(random, first, min(shard_rows, num_rows - first))
        storage.write_table(table, storage.join(folder, "data", f"train-{first:015d}.parquet"))
    manifest = {"stage": "score", "created": "", "counts": {}, "config": {}, "fingerprints": {}}
    storage.write_json(manifest, storage.join(folder, "manifest.json"))
    return storage.list_shards(folder)


def one_core(shards: list[str]) -> list[dict]:
    """Reading, masking under each of SETTINGS, and writing, in this process."""
    plans = {name: MaskPlan(0.8, 1.5, **options) for name, options in SETTINGS.items()}
    seconds = dict.fromkeys(["read", *plans, "write"], 0.0)
    rows = tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        for shard in shards:
            started = time.perf_counter()
            table = storage.read_table(shard)
            seconds["read"] += time.perf_counter() - started
            results = {}
            for name, plan in plans.items():
                started = time.perf_counter()
                results[name] = mask_table(table, plan, shard)
                seconds[name] += time.perf_counter() - started
            started = time.perf_counter()
            storage.write_table(results["sequence"].data, storage.join(folder, "shard.parquet"))
            seconds["write"] += time.perf_counter() - started
            rows += table.num_rows
            tokens += results["sequence"].counts["response_tokens"]
    return [
        {"what": f"one core: {name}", "seconds": taken, "rows_per_second": rows / taken,
         "response_tokens_per_second": tokens / taken}
        for name, taken in seconds.items()
    ]  # fmt: skip


def whole_job(source: str, scope: str) -> dict:
    """run_mask with Ray already started."""
    from pipelines.cluster import connect
    from pipelines.mask import run_mask

    connect()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        manifest = run_mask(MaskConfig(input=source, output=folder, scope=scope))
        taken = time.perf_counter() - started
    counts = manifest["counts"]
    return {
        "what": f"Ray job: {scope}", "seconds": taken, "rows_per_second": counts["rows_in"] / taken,
        "response_tokens_per_second": counts["response_tokens"] / taken,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shard-rows", type=int, default=20_000)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        shards = write_folder(folder, options.rows, options.shard_rows)
        made = time.perf_counter() - started
        results = [*one_core(shards), *(whole_job(folder, scope) for scope in ("sequence", "dataset"))]
    table = Table(title=f"{options.rows:,} rows in {len(shards)} shards (made in {made:.1f} s)")
    for name in ("what", "seconds", "rows/s", "response tokens/s"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for result in results:
        rates = (f"{result['rows_per_second']:,.0f}", f"{result['response_tokens_per_second']:,.0f}")
        table.add_row(result["what"], f"{result['seconds']:.2f}", *rates)
    Console().print(table)
    if options.json:
        report = {"rows": options.rows, "shards": len(shards), "results": results}
        storage.write_json(report, options.json)


if __name__ == "__main__":
    main()
