"""The library without Ray: load a model, make a direction, value a batch, mask it, take the masked loss.

    python examples/library.py                                             # the embedded model
    python examples/library.py --model FOLDER

The steps are those of docs/library.md, with more to look at.
"""

import argparse

import numpy as np
import torch

from alphatoken.batching import Batch, make_batch
from alphatoken.config import EMBEDDED_MODEL, DataOptions
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.encode import Encoder
from alphatoken.exact import Exact
from alphatoken.losses import masked_sft_loss
from alphatoken.model import load_model
from alphatoken.schema import IGNORE_INDEX
from alphatoken.selection import keep_tokens
from alphatoken.tokenizer import load_tokenizer

TARGET = [
    {"prompt": "What is 2 plus 3?", "completion": " It is 5."},
    {"prompt": "What is 4 plus 4?", "completion": " It is 8."},
]
DATA = [
    {"prompt": "What is 7 plus 3?", "completion": " It is 10, of course."},
    {"prompt": "What is 1 plus 6?", "completion": " It is blue."},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder or hub name")
    name = parser.parse_args().model

    scoring = load_model(name)  # frozen, in eval mode
    tokenizer = load_tokenizer(name)
    encoder = Encoder(tokenizer, DataOptions(), scoring.model.config.vocab_size)

    def batch_of(rows: list[dict]) -> Batch:
        encoded = [encoder.encode(row) for row in rows]
        return make_batch([row.input_ids for row in encoded], [row.response_mask for row in encoded]).to(scoring.device)

    # Where training should go: the gradient of the target rows' loss, in all linear weights.
    direction = mean_gradient(scoring, [batch_of(TARGET)], GradientOptions("all-linear")).tensors
    batch = batch_of(DATA)
    values = Exact(scoring, "all-linear", direction)(batch).adaptation.cpu()  # one for each response token

    # The highest 60% of each response are kept.
    lengths = [len(row) for row in batch.split(values)]
    keep = torch.from_numpy(keep_tokens(values.numpy(), np.cumsum([0, *lengths]), keep_fraction=0.6))
    for token, value, kept in zip(batch.targets.tolist(), values.tolist(), keep.tolist(), strict=True):
        print(f"{value:+.3e}  {'kept' if kept else '----'}  {tokenizer.decode([token])!r}")

    # A token is predicted from the position before its own.
    labels = torch.full_like(batch.input_ids, IGNORE_INDEX)
    rows, positions = batch.predicting
    labels[rows, positions + 1] = torch.where(keep.to(scoring.device), batch.targets, IGNORE_INDEX)
    scoring.model.requires_grad_(True)
    loss = masked_sft_loss(scoring.model(batch.input_ids).logits, labels)
    mean = loss.total / loss.count  # sums and counts: divide by the count of all batches that share a step
    mean.backward()
    print(f"mean loss of the {int(loss.count)} kept tokens: {mean.item():.3f}")


if __name__ == "__main__":
    main()
