"""`ray job submit --working-dir . -- python jobs/score.py ...` against a running cluster: a real local head."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
WAIT = 120  # seconds


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def head():
    """Address of the dashboard of a head of our own. Ends only its own processes: `ray stop` would end all of Ray."""
    port, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray-")  # pytest's own is too long a name for Ray's sockets
    bin_folder = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",  # the head listens on this machine only
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": "",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        f"{bin_folder}/ray", "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1",
        f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
        "--dashboard-host=127.0.0.1", f"--temp-dir={folder}",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + WAIT
        while _submit(address, environment, "true").returncode != 0:
            assert process.poll() is None and time.monotonic() < deadline, "the head did not start"
            time.sleep(1)
        yield address, environment
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _submit(address: str, environment: dict, *command: str, working_dir: str | None = None):
    folder = ["--working-dir", working_dir] if working_dir else []
    return subprocess.run(
        [f"{Path(sys.executable).parent}/ray", "job", "submit", "--address", address, *folder, "--", *command],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=WAIT,
    )  # fmt: skip


@pytest.mark.slow
def test_a_submitted_score_job(head, tiny_checkpoint, tmp_path):
    address, environment = head
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scored"
    done = _submit(
        address, environment, "python", "jobs/score.py", "--model", tiny_checkpoint, "--data", str(data),
        "--validation", str(data), "--output", str(output), working_dir=".",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["counts"]["rows_out"] == 8
