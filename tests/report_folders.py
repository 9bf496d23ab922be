"""SCORED folders for the report: hostile ids and token texts, rows of SFT or pairs, all token classes."""

import numpy as np
import pyarrow as pa

from alphatoken import schema, storage
from alphatoken.token_classes import TOKEN_CLASS_NAMES
from tests.scored_folder import scored_table
from tests.test_pair_masking import scored_pairs

VOCABULARY = 50
HOSTILE = '</script><script>window.hacked = 1</script><img src="https://example.org/x.png" onerror="window.hacked = 2">'
HOSTILE_TOKEN = 7


def token_classes() -> pa.Table:
    texts = [f" t{number}" for number in range(VOCABULARY)]
    texts[HOSTILE_TOKEN] = HOSTILE
    numbers = pa.array(np.arange(VOCABULARY) % len(TOKEN_CLASS_NAMES), pa.int8())
    columns = [pa.array(np.arange(VOCABULARY)), texts, pa.DictionaryArray.from_arrays(numbers, TOKEN_CLASS_NAMES)]
    return pa.table(columns, schema=schema.TOKEN_CLASSES)


def class_of_token() -> np.ndarray:
    return (np.arange(VOCABULARY) % len(TOKEN_CLASS_NAMES)).astype(np.int8)


def write_folder(folder: str, rows: int = 8, pairs: bool = False, seed: int = 0, shards: int = 2) -> pa.Table:
    """A finished SCORED folder; returns its rows."""
    if pairs:
        table = pa.Table.from_pylist(scored_pairs(rows, seed), schema=schema.SCORED_PAIRS)
    else:
        table = scored_table(np.random.default_rng(seed), 0, rows)
    ids = table["id"].to_pylist()
    ids[0] = HOSTILE
    table = table.set_column(table.column_names.index("id"), "id", pa.array(ids))
    size = -(-rows // shards)
    for first in range(0, rows, size):
        storage.write_table(table.slice(first, size), storage.join(folder, "data", f"train-{first:015d}.parquet"))
    storage.write_table(token_classes(), storage.join(folder, "token_classes.parquet"))
    manifest = {
        "stage": "score", "created": "2026-01-01T00:00:00+00:00", "pairs": pairs, "parameters": "all-linear",
        "counts": {"rows_in": rows + 3, "rows_out": rows, "rows_quarantined": 3, "response_tokens": 100,
                   "quarantine_reasons": {"no prompt": 3}},
        "config": {"model": "m", "data": ["d.jsonl"], "validation": ["v.jsonl"], "estimator": "exact"},
    }  # fmt: skip
    storage.write_json(manifest, storage.join(folder, "manifest.json"))
    reasons = ["response is 2100 tokens long", "response is 9 tokens long", "no response"]
    quarantine = [
        {"row_id": i, "id": str(i), "source": "d.jsonl", "position": i, "stage": "encode", "reason": reason}
        for i, reason in enumerate(reasons)
    ]
    uri = storage.join(folder, "quarantine", "quarantine-000000000000000.parquet")
    storage.write_table(pa.Table.from_pylist(quarantine, schema=schema.QUARANTINE), uri)
    return table
