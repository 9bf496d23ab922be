"""A small SCORED folder, as the score job would write it."""

import numpy as np
import pyarrow as pa

from alphatoken import schema, storage

CLASSES = ["word", "newline", "end-of-turn"]
VOCABULARY = 50
END_OF_TURN = 2
MANIFEST = {
    "stage": "score",
    "created": "2026-01-01T00:00:00+00:00",
    "counts": {},
    "config": {"model": "m", "data": ["d.jsonl"]},
    "fingerprints": {"model": "abc"},
}


def scored_table(random: np.random.Generator, first_row_id: int, num_rows: int) -> pa.Table:
    rows = []
    for number in range(num_rows):
        length, prompt = int(random.integers(4, 30)), int(random.integers(1, 4))
        inside = np.arange(length) >= prompt
        adaptation, stability, logprobs = (random.normal(size=(3, length)) * inside).astype(np.float32)
        input_ids = random.integers(3, VOCABULARY, size=length)
        input_ids[-1] = END_OF_TURN
        rows.append(
            {
                "row_id": first_row_id + number,
                "id": f"d.jsonl:{first_row_id + number}",
                "input_ids": input_ids,
                "response_mask": inside,
                "truncated": False,
                "adaptation": adaptation,
                "stability": stability,
                "logprobs": logprobs,
                "num_response_tokens": length - prompt,
                "mean_adaptation": adaptation[inside].mean(),
                "mean_stability": stability[inside].mean(),
                "mean_loss": -logprobs[inside].mean(),
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.SCORED)


def write_scored_folder(folder: str, rows_per_shard: tuple[int, ...] = (20, 30, 10), seed: int = 0) -> pa.Table:
    """Write it and return all its rows."""
    random = np.random.default_rng(seed)
    tables, first = [], 0
    for num_rows in rows_per_shard:
        tables.append(scored_table(random, first, num_rows))
        storage.write_table(tables[-1], storage.join(folder, "data", f"train-{first:015d}.parquet"))
        first += num_rows
    numbers = np.zeros(VOCABULARY, dtype=np.int8)
    numbers[END_OF_TURN] = CLASSES.index("end-of-turn")
    classes = {
        "token_id": np.arange(VOCABULARY),
        "text": [str(number) for number in range(VOCABULARY)],
        "token_class": pa.DictionaryArray.from_arrays(pa.array(numbers), CLASSES),
    }
    storage.write_table(pa.table(classes, schema=schema.TOKEN_CLASSES), storage.join(folder, "token_classes.parquet"))
    storage.write_json(MANIFEST, storage.join(folder, "manifest.json"))
    return pa.concat_tables(tables)
