"""Runs a script of this folder with the packages of tests/stacks/<name>.txt before those of this environment.

`./start test` installs them into .venv/stacks/<name>.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
INSTALLED = Path(sys.prefix, "stacks")


def run_beside(name: str, script: str, arguments: list[str], folder: Path) -> Any:
    """What the script's last line of output says, as JSON. Skips the test where the packages are not installed."""
    if not (INSTALLED / name).exists():
        pytest.skip(f"{name} is not installed: ./start test does it")
    environment = os.environ | {
        "PYTHONPATH": str(INSTALLED / name), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled",
        "DISABLE_VERSION_CHECK": "1",  # LLaMA-Factory's: it runs beside newer packages than it names
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
