"""What several actors on a machine hold once: weights in their file's dtype, and local directions."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch

from alphatoken import tensor_file
from alphatoken.model import fingerprint, load_model


def private() -> int:  # MiB that are of no file, so that no other process can have them
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return next(int(line[1]) for line in lines if line[0] == "Anonymous:") // 1024


load_model("smollm2-135m-instruct")  # made from its package where that was not done before
before = private()
scoring = load_model("smollm2-135m-instruct", "float32")
scoring.model(torch.zeros(1, 8, dtype=torch.long))
fingerprint(scoring.model)
weights = private() - before
path = sys.argv[1]
about = tensor_file.Provenance("direction", "", "all", "", 1, 1)
tensor_file.save(path, tensor_file.TensorFile(about, {"direction/a": torch.ones(2**26)}))
before = private()
found = tensor_file.load(path, "direction").group("direction")["a"]
assert float(found.sum()) == 2**26 and path in Path("/proc/self/maps").read_text()
direction = private() - before
found += 1  # its own copy from here on
assert float(tensor_file.load(path, "direction").group("direction")["a"].sum()) == 2**26
print(weights, direction)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's count of shared pages")
def test_a_second_process_needs_little_memory_of_its_own(tmp_path: Path) -> None:
    """513 MiB of weights and 256 MiB of direction are mapped files: other processes use the same pages."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "direction.safetensors")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    weights, direction = map(int, done.stdout.split()[-2:])
    assert weights < 100 and direction < 50
