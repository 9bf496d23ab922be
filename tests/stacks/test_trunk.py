"""--trunk-dtype int8 with torchao, which `./start test` installs into .venv/stacks/torchao."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INSTALLED = Path(sys.prefix, "stacks", "torchao")


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
    if not INSTALLED.exists():
        pytest.skip("torchao is not installed: ./start test does it")
    data, validation = write_rows(tmp_path / "data.jsonl", 12), write_rows(tmp_path / "validation.jsonl", 4)
    done = subprocess.run(
        [sys.executable, str(HERE / "run_trunk.py"), str(tiny_checkpoint), data, validation, str(tmp_path / "scored")],
        env=os.environ | {"PYTHONPATH": f"{INSTALLED}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rounded"] == found["kept"] == 14  # two layers of four are scored, seven linear layers in each
    assert found["same_fingerprint"]
    for name in ("exact", "propagation"):
        assert found[name] < 1e-4
        assert 1e-4 < found[f"{name}_moved"] < 0.5  # rounding did change them
    assert found["rows_in"] == found["rows_out"] == 12
