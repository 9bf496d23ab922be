"""Share of computed positions that are padding, on real rows: rows of similar length together, within a shard.

    python benchmarks/padding.py --data gsm8k=gsm8k/train.jsonl.gz code=gpteacher_codegen/train.jsonl.gz [--json FILE]

Beside batches of rows as they come, as many as fit the same budget. No model runs.
"""

import argparse
from pathlib import Path

import numpy as np
from common import DATA_HELP, embedded_file, print_table, write_result

from alphatoken.batching import plan_batches
from alphatoken.config import EMBEDDED_MODEL, DataOptions, ScoreConfig
from alphatoken.errors import BadRowError
from alphatoken.model_encoder import make_encoder
from alphatoken.sources import plan_units, read_unit
from pipelines.score import LARGEST_SHARD, shard_tokens

BUDGETS = (4096, 16384)  # --batch-tokens


def lengths_of(file: str, columns: dict[str, str], max_length: int) -> list[int]:
    """Tokens of every row that can be used."""
    encoder = make_encoder(EMBEDDED_MODEL, DataOptions(columns=columns, max_length=max_length))
    lengths = []
    for row in (row for unit in plan_units([file]) for row in read_unit(unit)):
        try:
            lengths.append(len(encoder.encode(row.data).input_ids) if row.data else 0)
        except BadRowError:
            continue
    return [length for length in lengths if length]


def shards_of(lengths: list[int], tokens: int) -> list[list[int]]:
    """Rows in a row, about so many tokens together."""
    ends = np.cumsum(lengths) // tokens
    return [[lengths[i] for i in np.flatnonzero(ends == number)] for number in np.unique(ends)]


def padding(lengths: list[int], shard: int, budget: int) -> float:
    computed = 0
    for part in shards_of(lengths, shard):
        computed += sum(max(part[i] for i in batch) * len(batch) for batch in plan_batches(part, budget))
    return 1 - sum(lengths) / computed


def padding_in_order(lengths: list[int], budget: int) -> float:
    """Rows as they come: a batch is full when one more row would pass the budget."""
    computed, batch = 0, [lengths[0]]
    for length in lengths[1:]:
        if max([*batch, length]) * (len(batch) + 1) > budget:
            computed += max(batch) * len(batch)
            batch = []
        batch.append(length)
    return 1 - sum(lengths) / (computed + max(batch) * len(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[f"gsm8k-demo={embedded_file('train.jsonl')}"],
                        help=f"as name=FILE. {DATA_HELP}")  # fmt: skip
    parser.add_argument("--columns", nargs="+", default=[], help="as of alphatoken score: prompt=question")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--json", help="write the result here")
    arguments = parser.parse_args()
    columns = dict(item.split("=") for item in arguments.columns)
    found = []
    for name, file in (item.split("=", 1) for item in arguments.data):
        lengths = lengths_of(file, columns, arguments.max_length)
        for budget in BUDGETS:
            config = ScoreConfig(
                model=EMBEDDED_MODEL, data=[file], output="none", estimator="loss", batch_tokens=budget
            )
            shard = shard_tokens(config, plan_units([file]))
            found.append(
                {"data": name, "file": Path(file).name, "rows": len(lengths), "tokens": sum(lengths),
                 "median": float(np.median(lengths)), "longest": max(lengths), "batch_tokens": budget,
                 "shard_tokens": shard, "padding": padding(lengths, shard, budget),
                 "padding_large_shard": padding(lengths, LARGEST_SHARD, budget),
                 "padding_in_order": padding_in_order(lengths, budget)}
            )  # fmt: skip
    rows = [
        [row["data"], f"{row['rows']:,}", f"{row['median']:.0f}", f"{row['longest']:,}", f"{row['batch_tokens']:,}",
         f"{row['shard_tokens']:,}", f"{row['padding']:.1%}", f"{row['padding_large_shard']:.1%}",
         f"{row['padding_in_order']:.1%}"]
        for row in found
    ]  # fmt: skip
    print_table(
        "Padding", ["data", "rows", "median", "longest", "batch", "shard", "padding", "large shards", "in order"], rows
    )
    write_result(arguments.json, {"rows": found})


if __name__ == "__main__":
    main()
