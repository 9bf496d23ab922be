"""A tiny model with a tokenizer on disk, and MASKED folders (SFT rows, preference pairs) that belong to it."""

import random
from pathlib import Path

import pyarrow as pa

from alphatoken import schema, storage
from alphatoken.token_classes import token_class_table
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import CHATML, byte_level

SFT_SCHEMA = pa.schema([*schema.ENCODED, *schema.MASKED_EXTRA])
SIDES = ("chosen", "rejected")


def write_model(folder: Path, seed: int = 0, architecture: str = "llama", **changes) -> str:
    tokenizer = byte_level(CHATML)
    size = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "num_hidden_layers": 2}
    tiny_model(architecture, seed=seed, **(size | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sft_rows(count: int, seed: int = 0, keep: float = 0.6, longest: int = 24) -> list[dict]:
    """Rows of unequal lengths with unequal numbers of kept tokens."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        length, prompt = draw.randint(6, longest), draw.randint(1, 4)
        ids = [draw.randint(20, 300) for _ in range(length)]
        inside = [i >= prompt for i in range(length)]
        labels = [token if there and draw.random() < keep else -100 for token, there in zip(ids, inside, strict=True)]
        if keep > 0:
            labels[-1] = ids[-1]
        rows.append(
            {"row_id": number, "id": f"r{number}", "input_ids": ids, "response_mask": inside, "truncated": False,
             "labels": labels, "value": [0.0] * length}
        )  # fmt: skip
    return rows


def pair_rows(count: int, seed: int = 0, keep: float = 0.6) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        row: dict = {"row_id": number, "prompt_ids": [draw.randint(20, 300) for _ in range(draw.randint(1, 5))]}
        for side in SIDES:
            length = draw.randint(2, 12)
            row[f"{side}_ids"] = [draw.randint(20, 300) for _ in range(length)]
            row[f"{side}_mask"] = [i == 0 or draw.random() < keep for i in range(length)]
        rows.append(row)
    return rows


def write_masked(folder: Path, rows: list[dict], model: str, shards: int = 2, **fingerprints) -> str:
    """As the mask job leaves it, with every `shards`-th row in a shard of its own."""
    folder = str(folder)
    is_sft = "labels" in rows[0]
    size = -(-len(rows) // shards)
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        names = part[0].keys() - set(SFT_SCHEMA.names)
        table = pa.Table.from_pylist(part) if not is_sft or names else pa.Table.from_pylist(part, schema=SFT_SCHEMA)
        storage.write_table(table, storage.join(folder, "data", f"train-{first:015d}.parquet"))
    tokenizer = byte_level(CHATML)
    storage.write_table(token_class_table(tokenizer, [], len(tokenizer)), storage.join(folder, "token_classes.parquet"))
    manifest = {"stage": "mask", "counts": {}, "config": {}, "fingerprints": fingerprints}
    storage.write_json(manifest | {"scored": {"config": {"model": model}}}, storage.join(folder, "manifest.json"))
    return folder
