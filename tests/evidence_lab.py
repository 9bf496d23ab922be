"""Data files of a few short rows for the studies in benchmarks/evidence, and the settings to run them on."""

import gzip
import json
from pathlib import Path

import numpy as np

from benchmarks.evidence.runs import FILES, Study
from benchmarks.evidence.training import Training

WORDS = ["system", "user", "answer", "prompt", "response", "hello", "today", "two", "three"]


def write_data(folder: Path) -> Path:
    """Every file that the studies read, under their names."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    sums = [{"question": f"{a} + {a + 1}?", "answer": f"It is {2 * a + 1} {words(2)}"} for a in range(40)]
    pairs = [
        {"instruction": words(3), "chosen": f"{words(2)} please", "rejected": f"{words(2)} now"} for _ in range(60)
    ]
    choice = {"query": "two", "endings": ["a", "b"], "label": 0}
    rows = {
        FILES["train"]: sums,
        FILES["test"]: sums,
        FILES["code"]: [{"instruction": "two", "response": words(12)}],
        FILES["text"]: [{"text": words(90)} for _ in range(3)],
        FILES["hellaswag"]: [choice],
        FILES["arc"]: [{"question": "two", "choices": ["a", "b"], "answer": 0}],
        "dolly_open_qa/train.jsonl.gz": [{"instruction": words(3)} for _ in range(4)],
        "wikitext2/valid.jsonl.gz": [{"text": words(30)} for _ in range(4)],
        "style_pref_1k/train.jsonl.gz": pairs,
    }
    for name, found in rows.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    return folder


def tiny_study(model: str, rate: float) -> Study:
    """The last two of a tiny model's four layers."""
    return Study(
        model, layers=2, test_rows=4, text_windows=2, questions=0, validation_rows=4,
        training=Training(rate, rows_per_step=2, rise=1),
    )  # fmt: skip
