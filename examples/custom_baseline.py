"""A signal of your own as an estimator, compared with exact values: a control behind the product's interface.

    python examples/custom_baseline.py                                     # the embedded model and some embedded rows

The signal here is how much more a token surprises than the model expected to be surprised: loss minus entropy.
"""

import argparse

import numpy as np
import pyarrow as pa
import torch

from alphatoken import schema
from alphatoken.baselines import forward_losses
from alphatoken.batching import Batch, make_batch
from alphatoken.config import EMBEDDED_MODEL, DataOptions, embedded_data
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.encode import Encoder
from alphatoken.exact import Exact
from alphatoken.masking import MaskPlan, flat, mask_table
from alphatoken.model import ScoringModel, load_model
from alphatoken.scoring import score_table
from alphatoken.sources import plan_units, read_unit
from alphatoken.tokenizer import load_tokenizer
from alphatoken.values import TokenValues


class Surprise:
    """An estimator is called with a batch and returns TokenValues. A value depends on its row alone."""

    def __init__(self, scoring: ScoringModel) -> None:
        self.scoring = scoring

    def __call__(self, batch: Batch) -> TokenValues:
        head = forward_losses(self.scoring, batch, entropy=True)
        # Higher is kept. To keep what does not surprise, turn the sign around.
        return TokenValues(head.losses - head.entropy, torch.zeros_like(head.losses), -head.losses)


def encoded_table(path: str, encoder: Encoder, count: int) -> pa.Table:
    """The first rows of a file, as `score` has them between encoding and scoring."""
    rows = [row for unit in plan_units([path]) for row in read_unit(unit)][:count]
    records = [{"row_id": row.row_id, "id": str(row.row_id), **vars(encoder.encode(row.data))} for row in rows]
    return pa.Table.from_pylist(records, schema=schema.ENCODED)


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder or hub name")
    parser.add_argument("--data", default=str(embedded_data() / "train.jsonl"))
    parser.add_argument("--validation", default=str(embedded_data() / "validation.jsonl"))
    parser.add_argument("--rows", type=int, default=8, help="rows of each file")
    arguments = parser.parse_args()

    scoring = load_model(arguments.model)
    encoder = Encoder(load_tokenizer(arguments.model), DataOptions(), scoring.model.config.vocab_size)
    table = encoded_table(arguments.data, encoder, arguments.rows)
    validation = encoded_table(arguments.validation, encoder, arguments.rows).to_pylist()
    batch = make_batch(*([row[name] for row in validation] for name in ("input_ids", "response_mask")))
    direction = mean_gradient(scoring, [batch.to(scoring.device)], GradientOptions("all-linear")).tensors

    found, kept = [], []
    for estimator in (Surprise(scoring), Exact(scoring, "all-linear", direction)):
        scored, refused, _ = score_table(table, estimator, batch_tokens=2048, device=scoring.device)
        assert not refused, refused
        inside = flat(scored, "response_mask")
        found.append(flat(scored, "adaptation")[inside])
        masked = mask_table(scored, MaskPlan(keep_fraction=0.8, stability_weight=0.0), "custom_baseline").data
        kept.append(flat(masked, "labels")[inside] != schema.IGNORE_INDEX)

    correlation = np.corrcoef(ranks(found[0]), ranks(found[1]))[0, 1]
    print(f"rank correlation with exact values, {len(found[0])} response tokens: {correlation:.2f}")
    print(f"tokens with the same fate at keep fraction 0.8: {np.mean(kept[0] == kept[1]):.1%}")


if __name__ == "__main__":
    main()
