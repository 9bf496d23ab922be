import os

import pyarrow as pa
import pytest

from alphatoken import storage
from alphatoken.errors import UserError

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
