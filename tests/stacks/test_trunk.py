"""--trunk-dtype with torchao."""

import json
import random
from pathlib import Path

import pytest

from tests.stacks.beside import run_beside


def write_rows(path: Path, count: int) -> str:
    words = random.Random(count)
    rows = [
        {"prompt": "hello two", "completion": " ".join(words.choices(["one", "two", "three", "four"], k=6))}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_values_are_those_of_the_rounded_weights(tiny_checkpoint, tmp_path):
    data, validation = write_rows(tmp_path / "data.jsonl", 12), write_rows(tmp_path / "validation.jsonl", 4)
    arguments = [str(tiny_checkpoint), data, validation, str(tmp_path / "scored")]
    both = run_beside("torchao", "run_trunk.py", arguments, tmp_path)
    assert both.keys() == {"int8", "nf4"}
    for found in both.values():
        assert found["rounded"] == found["kept"] == 14  # two layers of four are scored, seven linear layers in each
        assert found["same_fingerprint"] and found["same_spread"]
        for name in ("exact", "propagation"):
            assert found[name] < 1e-4
            assert 1e-4 < found[f"{name}_moved"] < 0.5  # rounding did change them
        assert found["rows_in"] == found["rows_out"] == 12
