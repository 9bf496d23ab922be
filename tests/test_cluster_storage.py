"""Head and worker share nothing but storage: two Ray nodes with folders of their own, an S3 server between them.

`ray job submit --working-dir` sends the code and a small model; data and results are s3:// addresses.
"""

import json
import logging
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from ray_nodes import ROOT, RayNodes

ROWS = 24
SECRETS = {"AWS_SECRET_ACCESS_KEY": "storage-secret-8461", "HF_TOKEN": "hub-secret-7350"}


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(server):
    """The S3 file system, with rows in s3://bucket."""
    fs = s3fs.S3FileSystem(key="user", secret=SECRETS["AWS_SECRET_ACCESS_KEY"], endpoint_url=server)
    fs.mkdir("bucket")
    rows = [{"id": f"row-{i}", "prompt": f"What is {i} + {i}?", "completion": f"{2 * i}."} for i in range(ROWS)]
    lines = [json.dumps(row) + "\n" for row in rows]
    fs.pipe_file("bucket/rows.jsonl", "".join([*lines, "{not json\n"]).encode())
    fs.pipe_file("bucket/validation.jsonl", "".join(lines[:4]).encode())
    return fs


@pytest.fixture(scope="module")
def working_dir(tiny_checkpoint, tmp_path_factory):
    """What is sent: the code, and a model where no hub is."""
    folder = tmp_path_factory.mktemp("sent") / "project"
    for name in ("alphatoken", "pipelines", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_checkpoint, folder / "model")
    return folder


@pytest.fixture(scope="module")
def cluster(server, bucket):
    """(cluster, folder of its head, folder of its worker): the head takes no work."""
    access = {"AWS_ACCESS_KEY_ID": "user", "AWS_ENDPOINT_URL": server, "AWS_DEFAULT_REGION": "us-east-1"}
    with RayNodes(**access, **SECRETS) as nodes:
        head = nodes.start_head("--num-cpus=0")
        worker = nodes.start_worker("--num-cpus=4")
        yield nodes, head, worker


def score(nodes: RayNodes, working_dir: Path) -> str:
    """What the job printed."""
    done = nodes.submit(
        "python", "jobs/score.py", "--model", "model", "--data", "s3://bucket/rows.jsonl",
        "--validation", "s3://bucket/validation.jsonl", "--output", "s3://bucket/scored", working_dir=working_dir,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def stored(fs: s3fs.S3FileSystem) -> dict[str, tuple]:
    fs.invalidate_cache()
    files = fs.find("bucket/scored", detail=True)
    return {name: (file["ETag"], file["LastModified"]) for name, file in files.items()}


@pytest.mark.full
def test_a_submitted_job_over_storage_alone(cluster, bucket, working_dir):
    nodes, head, worker = cluster
    printed = score(nodes, working_dir)

    first = stored(bucket)
    manifest = json.loads(bucket.cat_file("bucket/scored/manifest.json"))
    counts = manifest["counts"]
    assert (counts["rows_in"], counts["rows_out"], counts["rows_quarantined"]) == (ROWS + 1, ROWS, 1)
    shards = [name for name in first if "/data/train-" in name]
    ids = [row for name in shards for row in pq.read_table(bucket.open(name))["id"].to_pylist()]
    assert sorted(ids) == sorted(f"row-{i}" for i in range(ROWS))
    assert not any("/commits/" in name for name in first)

    # The worker had the code and the model from the job, the data from storage, and wrote nothing elsewhere.
    assert list(worker.rglob("jobs/score.py")) and list(worker.rglob("model/config.json"))
    written = [path for node in (head, worker) for path in node.rglob("*") if "working_dir_files" not in path.parts]
    assert not [path for path in written if path.suffix in (".parquet", ".jsonl") or path.name == "manifest.json"]

    again = score(nodes, working_dir)
    assert "s3://bucket/scored is already finished" in again
    assert stored(bucket) == first

    assert_no_secrets(printed + again, bucket, head, worker)


def assert_no_secrets(printed: str, bucket: s3fs.S3FileSystem, *nodes: Path) -> None:
    """Neither in what a run prints and writes, nor in the logs of Ray on its nodes."""
    texts = {"output": printed.encode()}
    texts |= {name: bucket.cat_file(name) for name in bucket.find("bucket/scored")}
    logs = [path for node in nodes for path in (node / "session_latest" / "logs").rglob("*") if path.is_file()]
    assert any("job-driver" in path.name for path in logs)
    texts |= {str(path): path.read_bytes() for path in logs}
    leaks = [(name, variable) for name, text in texts.items() for variable, secret in SECRETS.items()
             if secret.encode() in text]  # fmt: skip
    assert not leaks
