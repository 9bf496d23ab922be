"""What other training stacks read: MASKED columns to theirs, and how each is told to use them.

A stack that reads token ids and labels gets them; one that tokenises text itself would train on other tokens than were
valued, so it gets a clear no. Formats as of November 2026.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from alphatoken.errors import UserError
from alphatoken.masking import flat, offsets_of
from alphatoken.schema import BRANCHES, IGNORE_INDEX

Columns = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Format:
    """columns: of a MASKED shard. snippet: with {folder}. as_dataset: datasets' save_to_disk instead of Parquet."""

    columns: Columns
    snippet: str
    note: str = ""
    as_dataset: bool = False


def causal_columns(table: pa.Table) -> pa.Table:
    """input_ids, attention_mask, labels (unshifted)."""
    ids = table["input_ids"].combine_chunks()
    return pa.table({"input_ids": ids, "attention_mask": _ones_like(table, "input_ids"), "labels": table["labels"]})


def plain_columns(table: pa.Table) -> pa.Table:
    """input_ids, labels."""
    return table.select(["input_ids", "labels"])


def torchtune_columns(table: pa.Table) -> pa.Table:
    """tokens, labels (unshifted), and shifted_labels: entry i is the token to predict from tokens[: i + 1]."""
    labels, offsets = flat(table, "labels"), offsets_of(table, "labels")
    shifted = np.append(labels[1:], IGNORE_INDEX).astype(np.int32)
    shifted[offsets[1:] - 1] = IGNORE_INDEX
    tokens = table["input_ids"].combine_chunks()
    return pa.table({"tokens": tokens, "labels": table["labels"], "shifted_labels": _lists(offsets, shifted)})


def loss_mask_columns(table: pa.Table) -> pa.Table:
    """input_ids, loss_mask (1 where the token itself is trained on)."""
    kept = (flat(table, "labels") != IGNORE_INDEX).astype(np.int8)
    offsets = offsets_of(table, "labels")
    return pa.table({"input_ids": table["input_ids"].combine_chunks(), "loss_mask": _lists(offsets, kept)})


def branch_columns(table: pa.Table) -> pa.Table:
    """Of pairs: input_ids, attention_mask and labels of prompt and response together, for each branch."""
    columns: dict[str, pa.Array] = {}
    prompts, starts = flat(table, "prompt_ids"), offsets_of(table, "prompt_ids")
    for branch in BRANCHES:
        ids, inner = flat(table, f"{branch}_ids"), offsets_of(table, f"{branch}_ids")
        kept = flat(table, f"{branch}_mask")
        rows = range(table.num_rows)
        joined = [np.concatenate([prompts[starts[r] : starts[r + 1]], ids[inner[r] : inner[r + 1]]]) for r in rows]
        labels = [
            np.concatenate([
                np.full(starts[r + 1] - starts[r], IGNORE_INDEX, dtype=np.int32),
                np.where(kept[inner[r] : inner[r + 1]], ids[inner[r] : inner[r + 1]], IGNORE_INDEX),
            ])
            for r in rows
        ]  # fmt: skip
        columns[f"{branch}_input_ids"] = pa.array(joined, pa.list_(pa.int32()))
        columns[f"{branch}_attention_mask"] = pa.array([np.ones(len(x), np.int8) for x in joined], pa.list_(pa.int8()))
        columns[f"{branch}_labels"] = pa.array(labels, pa.list_(pa.int32()))
    return pa.table(columns)


def multimodal_branch_columns(table: pa.Table) -> pa.Table:
    """The same, with the media columns that LLaMA-Factory's collator looks up."""
    found = branch_columns(table)
    for name in ("images", "videos", "audios"):
        found = found.append_column(name, pa.nulls(found.num_rows, pa.list_(pa.string())))
    return found


def _ones_like(table: pa.Table, name: str) -> pa.ListArray:
    offsets = offsets_of(table, name)
    return _lists(offsets, np.ones(int(offsets[-1]), dtype=np.int8))


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


HF_SNIPPET = """
from datasets import load_dataset
from transformers import DataCollatorForSeq2Seq, Trainer  # the default collator drops labels when it pads

rows = load_dataset("parquet", data_files="{folder}/data/*.parquet", split="train")
trainer = Trainer(model, args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
"""

TRL_SNIPPET = """
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

rows = load_dataset("parquet", data_files="{folder}/data/*.parquet", split="train")
# Labels are used as they are, packing keeps them. Without max_length=None, rows would be cut at 1,024 tokens.
trainer = SFTTrainer(model, args=SFTConfig(max_length=None), train_dataset=rows)
"""

TRL_DPO_SNIPPET = """
from datasets import load_dataset
from trl import DPOConfig

from pipelines.trainers import DPOCollator, MaskedDPOTrainer  # TRL's own DPOTrainer tokenises text and knows no masks

rows = load_dataset("parquet", data_files="{folder}/data/*.parquet", split="train")
stored = "ref_chosen_logps" in rows.column_names
trainer = MaskedDPOTrainer(
    model, args=DPOConfig(precompute_ref_log_probs=stored), train_dataset=rows, processing_class=tokenizer,
    data_collator=DPOCollator(tokenizer.pad_token_id, None, stored, "loss"), dpo_mask="loss",
)
"""

AXOLOTL_SNIPPET = """
datasets:
  - path: {folder}/data
    ds_type: parquet
    # no `type:`: the rows are tokenised
"""

LLAMA_FACTORY_SNIPPET = """
tokenized_path: {folder}/dataset
dataset: masked  # some name has to be there; nothing is read under it
stage: {stage}
"""

UNSLOTH_SNIPPET = """
rows = load_dataset("parquet", data_files="{folder}/data/*.parquet", split="train")
trainer = SFTTrainer(model, args=SFTConfig(packing=False, max_length=None), train_dataset=rows)
"""

OPEN_INSTRUCT_SNIPPET = """
# A transform is mandatory there: register one that returns rows as they are, and name it.
--dataset_mixer_list {folder}/data 1.0 --dataset_transform_fn IDENTITY
"""

VERL_SNIPPET = """
# token_masked.py, for data.custom_cls.path=token_masked.py data.custom_cls.name=TokenMasked
import pandas, torch

class TokenMasked(torch.utils.data.Dataset):
    def __init__(self, parquet_files, tokenizer, config, processor=None, max_samples=-1):
        files = [parquet_files] if isinstance(parquet_files, str) else parquet_files  # or folders of them
        self.rows = pandas.concat([pandas.read_parquet(file) for file in files])
        self.padded = config.get("pad_mode", "right") == "right"
        # Longer rows are cut there: set data.max_length
        self.length, self.pad = config.get("max_length", 1024), tokenizer.pad_token_id

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows.iloc[index]
        found = {{name: torch.tensor(row[name][: self.length]).long() for name in ("input_ids", "loss_mask")}}
        found["position_ids"] = torch.arange(len(found["input_ids"]))
        if self.padded:
            found["attention_mask"] = torch.ones_like(found["input_ids"])
            missing = self.length - len(found["input_ids"])
            for name, value in found.items():
                fill = self.pad if name == "input_ids" else 0
                found[name] = torch.nn.functional.pad(value, (0, missing), value=fill)
        return found

# data.train_files={folder}/data
"""

TORCHTUNE_SNIPPET = """
# For padded_collate_sft. The recipes of torchtune 0.6.1, its last release, shift labels themselves.
rows = load_dataset("parquet", data_files="{folder}/data/*.parquet", split="train")
# A checkout of its main branch from after April 2025 wants them shifted:
# rows = rows.remove_columns("labels").rename_column("shifted_labels", "labels")
"""

MASKS_BOTH = (
    "This stack masks the log-ratios as well as their gradient (`--dpo-mask ratio` here). The paper keeps the "
    "whole-response log-ratio and masks the gradient alone: `alphatoken train --objective dpo` does that."
)

SFT: dict[str, Format] = {
    "trl": Format(plain_columns, TRL_SNIPPET),
    "hf-trainer": Format(causal_columns, HF_SNIPPET),
    "axolotl": Format(causal_columns, AXOLOTL_SNIPPET),
    "llama-factory": Format(causal_columns, LLAMA_FACTORY_SNIPPET.replace("{stage}", "sft"), as_dataset=True),
    "unsloth": Format(plain_columns, UNSLOTH_SNIPPET),
    "open-instruct": Format(causal_columns, OPEN_INSTRUCT_SNIPPET),
    "verl": Format(loss_mask_columns, VERL_SNIPPET),
    "torchtune": Format(torchtune_columns, TORCHTUNE_SNIPPET),
}
DPO: dict[str, Format] = {
    "trl": Format(lambda table: table, TRL_DPO_SNIPPET),
    "llama-factory": Format(
        multimodal_branch_columns, LLAMA_FACTORY_SNIPPET.replace("{stage}", "dpo"), MASKS_BOTH, as_dataset=True
    ),
    "open-instruct": Format(branch_columns, OPEN_INSTRUCT_SNIPPET, MASKS_BOTH),
}
REFUSED = {
    "openrlhf": "OpenRLHF tokenises text itself, so token masks cannot reach its loss",
    "ms-swift": "ms-swift tokenises text itself and weighs whole segments of it, so token masks cannot reach its loss",
    "nemo-rl": "NeMo-RL masks by the role of text segments, so token masks cannot reach its loss",
}
STACKS = sorted({*SFT, *DPO, *REFUSED})


def format_of(stack: str, pairs: bool) -> Format:
    """UserError where the stack cannot train on token masks of this kind of data."""
    if stack in REFUSED:
        raise UserError(f"--to {stack}: {REFUSED[stack]}; train with `alphatoken train`, or one of {', '.join(SFT)}")
    known = DPO if pairs else SFT
    if stack in known:
        return known[stack]
    if stack in SFT:
        raise UserError(
            f"--to {stack}: it has no token masks in DPO; use `alphatoken train --objective dpo`, or one of "
            f"{', '.join(DPO)}"
        )
    raise UserError(f"--to {stack}: no such stack; there are {', '.join(STACKS)}")
