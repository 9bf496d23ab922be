"""Value tokens for several target tasks in one pass, and mask by their weighted sum.

    python examples/several_targets.py                                     # embedded rows: word problems, and sums
    python examples/several_targets.py --data train.jsonl --target a=target.jsonl b=heldout.jsonl --output runs/mine

The rows are scored once. Other weights need no scoring: a mask is derived from the targets' stored columns.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa

from alphatoken import storage
from alphatoken.config import EMBEDDED_MODEL, ScoreConfig, embedded_rows
from alphatoken.mask_config import MaskConfig
from alphatoken.masking import flat
from alphatoken.targets import target_column
from pipelines.mask import run_mask
from pipelines.score import run_score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder or hub name")
    parser.add_argument("--data", help="rows to score; default: 16 embedded ones")
    parser.add_argument("--target", nargs="+", metavar="NAME=FILE", help="rows of each target; default: embedded ones")
    parser.add_argument("--output", default="runs/example-targets", help="folder for everything that is written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(arguments.output)
    scored = folder / "scored"

    # A direction for each target, one forward pass over the rows for all of them.
    manifest = run_score(
        ScoreConfig(
            model=arguments.model,
            data=[arguments.data or embedded_rows("train.jsonl", 16, folder / "train.jsonl")],
            validation=arguments.target
            or [
                f"problems={embedded_rows('validation.jsonl', 8, folder / 'problems.jsonl')}",
                f"sums={embedded_rows('sums_validation.jsonl', 8, folder / 'sums.jsonl')}",
            ],
            output=str(scored),
        )
    )
    targets = manifest["targets"]
    table = pa.concat_tables(storage.read_table(shard) for shard in storage.list_shards(str(scored)))
    inside = flat(table, "response_mask")
    values = {name: flat(table, target_column(name))[inside] for name in targets}
    for name, found in values.items():
        print(f"{target_column(name)}: mean size {np.abs(found).mean():.3e}")
    first, last = targets[0], targets[-1]
    print(f"correlation of {first} and {last}: {np.corrcoef(values[first], values[last])[0, 1]:.2f}")

    # The sum is dominated by the target with the larger values, unless weights say otherwise.
    equal = {name: 1 / float(np.abs(found).mean()) for name, found in values.items()}
    for title, weights in (("plain sum", {}), ("equal sizes", equal)):
        output = folder / title.replace(" ", "-")
        counts = run_mask(MaskConfig(input=str(scored), output=str(output), target_weights=weights))["counts"]
        print(f"{title}: {counts['kept_tokens']} of {counts['response_tokens']} response tokens kept, in {output}")


if __name__ == "__main__":
    main()
