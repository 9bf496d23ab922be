import errno
import os
from collections import Counter

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from alphatoken import retries, storage, tensor_file
from alphatoken.errors import UserError
from alphatoken.run_folder import RunFolder, row_id_runs

TABLE = pa.table({"row_id": pa.array([1, 2], pa.int64()), "x": pa.array([[1.0], []], pa.list_(pa.float32()))})


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "folder")
    uri = f"memory://{tmp_path.name}"
    storage.remove_tree(uri)
    return uri


def test_table_and_json_round_trip(root):
    storage.write_table(TABLE, storage.join(root, "a", "t.parquet"))
    storage.write_json({"b": [1, None]}, storage.join(root, "b.json"))
    assert storage.read_table(storage.join(root, "a", "t.parquet")).equals(TABLE)
    assert storage.read_table(storage.join(root, "a/t.parquet"), ["x"]).column_names == ["x"]
    assert storage.read_schema(storage.join(root, "a/t.parquet")) == TABLE.schema
    assert storage.read_json(storage.join(root, "b.json")) == {"b": [1, None]}
    assert storage.read_json_files([storage.join(root, "b.json")]) == [{"b": [1, None]}]
    assert storage.list_names(root) == ["a", "b.json"]
    storage.remove_tree(root)
    assert not storage.exists(root)
    storage.remove_tree(root)


def test_shards_are_sorted_and_nothing_else(root):
    for name in ("train-000000000000010.parquet", "train-000000000000002.parquet", ".train-1.parquet.x.tmp", "notes"):
        storage.write_bytes(b"", storage.join(root, "data", name))
    names = [storage.name_of(uri) for uri in storage.list_shards(root)]
    assert names == ["train-000000000000002.parquet", "train-000000000000010.parquet"]


def test_a_folder_called_like_a_partition_adds_no_column(tmp_path):
    uri = str(tmp_path / "lr=1e-4" / "t.parquet")
    storage.write_table(TABLE, uri)
    assert storage.read_table(uri).column_names == TABLE.column_names


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    uri = str(tmp_path / "a.json")
    storage.write_json(1, uri)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        storage.write_json(2, uri)
    assert storage.read_json(uri) == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_errors_for_people(tmp_path):
    missing, broken = str(tmp_path / "none.parquet"), str(tmp_path / "broken.parquet")
    storage.write_bytes(b"PAR1 but not really", broken)
    with pytest.raises(UserError, match="none.parquet does not exist"):
        storage.read_table(missing)
    with pytest.raises(UserError, match="none.parquet does not exist"):
        storage.read_json(missing)
    with pytest.raises(UserError, match="broken.parquet is not a readable Parquet file"):
        storage.read_table(broken)
    with pytest.raises(UserError, match="not valid JSON"):
        storage.read_json(broken)
    with pytest.raises(UserError, match="no data/train"):
        storage.list_shards(str(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        storage.list_names(broken)
    with pytest.raises(UserError, match="nosuch://x"):
        storage.filesystem("nosuch://x")
    storage.write_table(TABLE, missing)
    with pytest.raises(UserError, match="lacks the columns y, z"):
        storage.read_table(missing, ["x", "z", "y"])


def test_join_and_places(tmp_path, monkeypatch):
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.join("memory://", "b") == "memory://b"
    monkeypatch.chdir(tmp_path)
    assert storage.same_place("x", str(tmp_path / "y" / ".." / "x"))
    assert not storage.same_place("x", "memory://x")
    assert storage.absolute("x") == str(tmp_path / "x")
    assert storage.absolute("memory://x") == "memory://x"


# Storage that fails now and then


class FlakyFileSystem(MemoryFileSystem):
    """Every kind of operation fails `failures` times in a row before it succeeds once."""

    protocol = "flaky"
    store: dict = {}
    pseudo_dirs = [""]
    error: Exception | None = None
    failures = depth = 0
    failed: Counter = Counter()
    broken: set[str] = set()  # kinds that never succeed

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _maybe_fail(self, kind):
        if self.error and (kind in self.broken or self.failed[kind] < self.failures):
            self.failed[kind] += 1
            raise self.error
        self.failed[kind] = 0


def _flaky(name):
    def operation(self, *args, **kwargs):
        if self.depth == 0:  # one operation may be made of others
            self._maybe_fail(name)
        self.depth += 1
        try:
            return getattr(MemoryFileSystem, name)(self, *args, **kwargs)
        finally:
            self.depth -= 1

    return operation


for _name in ("cat_file", "pipe_file", "_open", "mv", "rm_file", "rm", "info", "ls"):
    setattr(FlakyFileSystem, _name, _flaky(_name))


@pytest.fixture(params=[True, False], ids=["object-store", "renames"])
def flaky(request, monkeypatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    waits: list[int] = []
    monkeypatch.setattr(retries, "wait", waits.append)
    if request.param:
        monkeypatch.setattr(storage, "OBJECT_STORES", storage.OBJECT_STORES | {"flaky"})
    fs = fsspec.filesystem("flaky")
    fs.waits = waits
    yield fs
    fs.store.clear()
    fs.failed.clear()
    fs.error, fs.failures = None, 0
    fs.broken = set()


class ServerDisconnectedError(Exception):
    """As aiohttp raises it."""


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code):
        super().__init__(f"status {code}")
        self.code = code


PASSING = [ConnectionResetError("reset"), TimeoutError("too slow"), OSError(errno.EBUSY, "slow down"), HttpError(503),
           OSError(errno.EIO, "internal error"), ServerDisconnectedError("gone"), OSError(errno.ESTALE, "stale"),
           fsspec.exceptions.FSTimeoutError()]  # fmt: skip
STAYING = [FileNotFoundError(errno.ENOENT, "no"), PermissionError(errno.EACCES, "no"), OSError("broken"), ValueError(),
           IsADirectoryError(errno.EISDIR, "no"), OSError(errno.ENAMETOOLONG, "no"), HttpError(403)]  # fmt: skip


def test_which_failures_may_pass():
    assert all(map(retries.is_transient, PASSING))
    assert not any(map(retries.is_transient, [*STAYING, OSError(errno.ENOSPC, "full")]))


def test_everything_works_on_storage_that_fails_now_and_then(flaky):
    flaky.error, flaky.failures = ConnectionResetError("reset"), 1  # of each kind: several in one attempt add up
    root = "flaky://bucket"
    storage.write_table(TABLE, storage.join(root, "data", "train-1.parquet"))
    storage.write_json({"a": 1}, storage.join(root, "a.json"))
    storage.write_json({"a": 2}, storage.join(root, "a.json"))
    assert storage.read_table(storage.join(root, "data", "train-1.parquet")).equals(TABLE)
    assert storage.read_schema(storage.join(root, "data", "train-1.parquet")) == TABLE.schema
    assert storage.count_rows(storage.join(root, "data", "train-1.parquet")) == 2
    assert storage.read_json(storage.join(root, "a.json")) == {"a": 2}
    assert storage.read_json_files([storage.join(root, "a.json")]) == [{"a": 2}]
    assert storage.list_names(root) == ["a.json", "data"]
    assert storage.exists(storage.join(root, "a.json")) and not storage.exists(storage.join(root, "b.json"))
    storage.remove_file(storage.join(root, "a.json"))
    assert not storage.exists(storage.join(root, "a.json"))
    about = tensor_file.Provenance("direction", "m", "all-linear", "d", 1, 2)
    tensors = tensor_file.TensorFile(about, {"direction/w": torch.ones(2)})
    tensor_file.save(storage.join(root, "g.safetensors"), tensors)
    assert tensor_file.load(storage.join(root, "g.safetensors"), "direction").provenance == about
    storage.remove_tree(root)
    assert not storage.exists(root)
    assert flaky.waits and set(flaky.waits) <= {1, 2, 3}


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_storage_that_stays_away_is_one_sentence_after_few_attempts(flaky, error):
    flaky.error, flaky.broken = error, {"pipe_file", "_open", "info"}
    with pytest.raises(UserError, match=r"flaky://x/a.json: the storage failed 4 times \(.+\).*it resumes"):
        storage.write_json(1, "flaky://x/a.json")
    assert flaky.waits == [1, 2, 3]
    with pytest.raises(UserError, match="the storage failed 4 times"):  # not: there is no such file
        storage.exists("flaky://x/a.json")


@pytest.mark.parametrize("error", STAYING, ids=repr)
def test_what_another_attempt_cannot_change_is_not_repeated(flaky, error):
    flaky.error, flaky.broken = error, {"pipe_file", "_open"}
    with pytest.raises(type(error)):
        storage.write_json(1, "flaky://x/a.json")
    assert not flaky.waits


def test_waits_grow(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    for attempt in (1, 2, 3):
        retries.wait(attempt)
    assert [0.5 <= waits[0] <= 0.75, 1 <= waits[1] <= 1.5, 2 <= waits[2] <= 3] == [True] * 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_the_run_resumes(tmp_path, monkeypatch, code):
    identity = {"stage": "score"}
    folder = RunFolder(str(tmp_path / "out"))

    def write(number: int) -> None:
        shard = pa.table({"row_id": pa.array([number], pa.int64())})
        folder.write_shard(shard, None, {"first_row_id": number, "row_ids": row_id_runs(np.array([number]))})

    assert folder.open(identity) == "new"
    write(0)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(UserError, match=rf"train-.*: no space is left there \({os.strerror(code)}\); free"):
        write(1)
    monkeypatch.setattr(os, "fsync", fsync)
    assert not [name for name in os.listdir(tmp_path / "out" / "data") if name.endswith(".tmp")]
    assert folder.open(identity) == "resume"
    assert folder.finished_row_ids() == [[0, 0]]
    write(1)
    assert folder.finished_row_ids() == [[0, 1]]
