"""The last line on stderr says why a job ended."""

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from alphatoken.errors import UserError
from alphatoken.mask_config import MaskConfig
from jobs import cli

GIVEN = ["--input", "scored", "--output", "masked"]


def last_line(work, capsys, *options: str) -> tuple[int, str]:
    code = cli.run(MaskConfig, work, [*GIVEN, *options])
    return code, capsys.readouterr().err.splitlines()[-1]


def manifest(age: float) -> dict:
    return {"created": (datetime.now(UTC) - timedelta(seconds=age)).isoformat(timespec="seconds")}


def raising(error: BaseException):
    def work(config):
        raise error

    return work


def test_finished_now_or_before(capsys):
    code, line = last_line(lambda config: manifest(0), capsys)
    assert code == 0 and line.startswith("alphatoken mask: finished in 0.")
    code, line = last_line(lambda config: manifest(3600), capsys, "--json")
    assert code == 0 and line.startswith("alphatoken mask: already finished, at 20")
    code, line = last_line(lambda config: {"num_rows": 3, "already_finished": True}, capsys, "--json")
    assert (code, line) == (0, "alphatoken mask: already finished")
    code, line = last_line(lambda config: None, capsys)
    assert code == 0 and line.startswith("alphatoken mask: finished in")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("scored is empty; give another folder"), 2, "scored is empty; give another folder"),
        (ValueError("x"), 1, "ValueError: x (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted by Ctrl-C; run the same command again to go on"),
    ],
)
def test_errors(error, code, line, capsys):
    assert last_line(raising(error), capsys) == (code, f"alphatoken mask: {line}")


def test_a_job_that_is_stopped(capsys):
    def work(config):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    code, line = last_line(work, capsys)
    assert (code, line) == (143, "alphatoken mask: interrupted by SIGTERM; run the same command again to go on")
    assert signal.getsignal(signal.SIGTERM) == before


STOPPED_WHILE_RAY_RUNS = """
import os, signal, sys, threading, time
import ray
from alphatoken.mask_config import MaskConfig
from jobs import cli
from pipelines.cluster import connect

@ray.remote
def wait():
    time.sleep(100)

def work(config):
    connect(2)
    found = wait.remote()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    ray.get(found) if sys.argv[1] == "get" else time.sleep(100)

code = cli.run(MaskConfig, work, ["--input", "scored", "--output", "masked"])
ray.shutdown()
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("waiting", ["get", "sleep"])
def test_a_job_that_is_stopped_while_ray_runs(tmp_path, waiting):
    """Ray's C++ code has a handler of its own, which aborts."""
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED_WHILE_RAY_RUNS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "RAY_ADDRESS": ""}
    command = [sys.executable, str(script), waiting]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "alphatoken mask: interrupted by SIGTERM; run the same command again to go on"
    assert "SIGTERM received at" not in done.stderr
