"""Ray nodes of our own on this machine: processes that share nothing but the network.

Each has a home, a working folder and a temporary folder of its own, and all take the token of their cluster. Only our
own processes are ended: `ray stop` would end all of Ray.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LOCALHOST = "127.0.0.1"
WAIT = 120  # seconds


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind((LOCALHOST, 0))
        return found.getsockname()[1]


class RayNodes:
    """A cluster on this machine, as a context manager. `variables` are the nodes' environment beside the usual."""

    def __init__(self, **variables: str):
        self.token = uuid.uuid4().hex
        self.variables = variables
        self.folders: list[Path] = []
        self.processes: list[subprocess.Popen] = []
        self.port, self.dashboard_port, self.metrics_port = free_port(), free_port(), free_port()
        self.dashboard = f"http://{LOCALHOST}:{self.dashboard_port}"
        self.address = f"{LOCALHOST}:{self.port}"

    def __enter__(self) -> "RayNodes":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_processes()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)

    def environment(self, home: Path) -> dict[str, str]:
        """Of a node or of whoever submits: nothing of this process's Ray, nothing of its credentials."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        return kept | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(home),
            "TMPDIR": str(home),
            "PYTHONPATH": "",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            **self.variables,
        }

    def start_head(self, *options: str, **variables: str) -> Path:
        """The head's folder, once its dashboard answers."""
        folder = self._start(
            "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}",
            f"--metrics-export-port={self.metrics_port}", *options, **variables,
        )  # fmt: skip
        self.wait_until("the head answers", lambda: self.alive())
        return folder

    def start_worker(self, *options: str) -> Path:
        """The worker's folder, once the head knows it."""
        before = len(self.alive())
        folder = self._start(f"--address={self.address}", f"--metrics-export-port={free_port()}", *options)
        self.wait_until("the worker joins", lambda: len(self.alive()) > before)
        return folder

    def alive(self) -> list[dict]:
        """The nodes that the head takes for alive; none before it answers."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/v0/nodes?detail=1", headers={"Authorization": f"Bearer {self.token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
        except (urllib.error.URLError, OSError):
            return []
        return [node for node in nodes if node["state"] == "ALIVE"]

    def wait_until(self, what: str, happened: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT
        while not happened():
            ended = [process.args[1:3] for process in self.processes if process.poll() is not None]
            assert not ended, f"{ended} ended before {what}"
            assert time.monotonic() < deadline, f"waited {WAIT} s until {what}"
            time.sleep(0.2)

    def submit(
        self, *command: str, working_dir: str | Path | None = None, cwd: str | Path = ROOT
    ) -> subprocess.CompletedProcess:
        """`ray job submit`, waited for: the outside world's view of the cluster."""
        sent = ["--working-dir", str(working_dir)] if working_dir else []
        line = [f"{BIN}/ray", "job", "submit", "--address", self.dashboard, *sent, "--", *command]
        home = self._folder()
        return subprocess.run(
            line, env=self.environment(home), cwd=cwd, capture_output=True, text=True, timeout=4 * WAIT
        )

    def _start(self, *options: str, **variables: str) -> Path:
        folder = self._folder()
        command = [
            f"{BIN}/ray", "start", "--block", f"--node-ip-address={LOCALHOST}", f"--temp-dir={folder}",
            "--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}",
            "--disable-usage-stats", *options,
        ]  # fmt: skip
        environment = self.environment(folder) | variables
        with open(folder / "ray-start.log", "w") as log:
            process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return folder

    def _folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="ray-"))  # pytest's own is too long a name for Ray's sockets
        self.folders.append(folder)
        return folder

    def _end_processes(self) -> None:
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in [*found, *self._by_folder()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for process in self.processes:
            process.wait()

    def _by_folder(self) -> list[psutil.Process]:
        """What has lost its parent, by the folder in its command line, which no one else has."""
        names = [str(folder) for folder in self.folders]
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                line = " ".join(each.cmdline())
                if each.pid != os.getpid() and any(name in line for name in names):
                    found.append(each)
        return found
