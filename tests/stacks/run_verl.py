"""`python run_verl.py MODEL FOLDER OUTPUT STEPS`: verl's collator and SFT loss; prints the losses of its steps.

Run by test_stacks.py: nothing of AlphaToken is imported. The class of rows is the one that the export's README tells
its reader to write. verl's engines run on accelerators only, so the steps in between are plain torch.
"""

import json
import sys
from pathlib import Path

import torch
from snippet import snippet_of
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.utils import tensordict_utils
from verl.utils.dataset.dataset_utils import DatasetPadMode, SFTTensorCollator
from verl.utils.import_utils import load_extern_object
from verl.workers.utils.losses import sft_loss


def logprobs(model, input_ids: torch.Tensor) -> torch.Tensor:
    """As verl's engines give them: entry i is about token i + 1."""
    found = [model(row[None]).logits[0].log_softmax(-1) for row in input_ids.unbind()]
    next_ids = [row.roll(-1) for row in input_ids.unbind()]
    rows = [each.gather(-1, ids[:, None])[:, 0] for each, ids in zip(found, next_ids, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


if __name__ == "__main__":
    path, folder, output, steps = sys.argv[1:]
    Path(output).mkdir(parents=True, exist_ok=True)
    Path(output, "token_masked.py").write_text(snippet_of(folder))
    rows = load_extern_object(f"{output}/token_masked.py", "TokenMasked")(
        [str(shard) for shard in sorted(Path(folder, "data").glob("*.parquet"))],
        AutoTokenizer.from_pretrained(path),
        {"pad_mode": DatasetPadMode.NO_PADDING, "max_length": 64},
    )
    model = AutoModelForCausalLM.from_pretrained(path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    collate = SFTTensorCollator(DatasetPadMode.NO_PADDING)
    losses = []
    for batch in [*DataLoader(rows, batch_size=len(rows), collate_fn=collate)] * int(steps):
        more = {"dp_size": 1, "batch_num_tokens": float(batch["loss_mask"].values().sum())}
        data = tensordict_utils.get_tensordict(batch, more | {"pad_mode": DatasetPadMode.NO_PADDING})
        loss, _ = sft_loss(None, {"log_probs": logprobs(model, batch["input_ids"])}, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    print(json.dumps(losses))
