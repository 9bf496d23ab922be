import numpy as np
import pyarrow as pa
import pytest

from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.run_folder import RunFolder, merge_runs, row_id_runs

IDENTITY = {"stage": "mask", "config": {"keep_fraction": 0.8, "protect": []}, "fingerprints": {"data": "abc"}}


def rows(*ids: int) -> pa.Table:
    return pa.table({"row_id": pa.array(ids, pa.int64())})


def record(*ids: int) -> dict:
    return {"first_row_id": min(ids), "row_ids": row_id_runs(np.array(ids)), "counts": {"rows_in": len(ids)}}


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    uri = str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}/out"
    storage.remove_tree(uri)
    return RunFolder(uri)


def names(folder, *parts):
    return storage.list_names(storage.join(folder.uri, *parts)) if parts else storage.list_names(folder.uri)


def test_runs():
    assert row_id_runs(np.array([], dtype=np.int64)) == []
    assert row_id_runs(np.array([7, 1, 2, 3, 9, 10])) == [[1, 3], [7, 7], [9, 10]]
    assert merge_runs([]) == []
    assert merge_runs([[9, 10], [1, 3], [4, 4], [2, 2], [12, 12]]) == [[1, 4], [9, 10], [12, 12]]
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = random.choice(60, size=random.integers(1, 60), replace=False)
        parts = np.array_split(random.permutation(ids), 4)
        assert merge_runs([run for part in parts for run in row_id_runs(part)]) == row_id_runs(ids)


def test_new_then_shards_then_finished(folder):
    assert folder.open(IDENTITY) == "new"
    folder.write_shard(rows(1, 2), rows(3), record(1, 2, 3))
    folder.write_shard(None, rows(4), record(4))
    folder.write_shard(rows(5), rows().slice(0, 0), record(5))
    assert names(folder, "data") == ["train-000000000000001.parquet", "train-000000000000005.parquet"]
    assert names(folder, "quarantine") == [
        "quarantine-000000000000001.parquet",
        "quarantine-000000000000004.parquet",
    ]
    assert [commit["first_row_id"] for commit in folder.commits()] == [1, 4, 5]
    assert folder.finished_row_ids() == [[1, 5]]
    folder.finish({"stage": "mask"}, "card")
    assert names(folder) == ["README.md", "data", "manifest.json", "quarantine", "run.json"]
    assert folder.open(IDENTITY) == "finished"
    assert folder.manifest() == {"stage": "mask"}


def test_a_retried_task_replaces_its_shard(folder):
    folder.open(IDENTITY)
    folder.write_shard(rows(1), rows(2), record(1, 2))
    folder.write_shard(rows(1, 2), None, record(1, 2))
    assert names(folder, "quarantine") == []
    assert storage.read_table(storage.list_shards(folder.uri)[0]).num_rows == 2
    assert folder.finished_row_ids() == [[1, 2]]


def test_resume_removes_what_was_not_committed(folder):
    folder.open(IDENTITY)
    folder.write_shard(rows(1), rows(2), record(1, 2))
    folder.write_shard(rows(3), rows(4), record(3, 4))
    storage.remove_file(storage.join(folder.uri, "commits", "000000000000003.json"))
    temporary = f".train-000000000000009.parquet.{'0' * 32}.tmp"
    storage.write_bytes(b"half", storage.join(folder.uri, "data", temporary))
    assert folder.open(IDENTITY) == "resume"
    assert names(folder, "data") == ["train-000000000000001.parquet"]
    assert names(folder, "quarantine") == ["quarantine-000000000000001.parquet"]
    assert folder.finished_row_ids() == [[1, 2]]


def test_killed_between_manifest_and_the_end(folder):
    folder.open(IDENTITY)
    folder.write_shard(rows(1), None, record(1))
    storage.write_json({}, storage.join(folder.uri, "manifest.json"))
    assert folder.open(IDENTITY) == "finished"
    assert "commits" not in names(folder)
    assert len(storage.list_shards(folder.uri)) == 1


def test_another_run_is_refused_by_name_and_replaced_on_demand(folder):
    folder.open(IDENTITY)
    folder.write_shard(rows(1), rows(2), record(1, 2))
    storage.write_bytes(b"mine", storage.join(folder.uri, "notes.txt"))
    other = {**IDENTITY, "config": {"keep_fraction": 0.5, "protect": ["newline"]}}
    with pytest.raises(UserError) as caught:
        folder.open(other)
    assert "config.keep_fraction: 0.8 -> 0.5; config.protect: [] -> ['newline']" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert len(storage.list_shards(folder.uri)) == 1
    assert folder.open(other, overwrite=True) == "new"
    assert names(folder, "data") == names(folder, "quarantine") == names(folder, "commits") == []
    assert storage.read_bytes(storage.join(folder.uri, "notes.txt")) == b"mine"
    assert folder.open(other) == "resume"
    folder.write_shard(rows(1), None, record(1))
    assert folder.open(other, overwrite=True) == "resume"  # a job that is started again must not lose its work
    storage.write_json({}, storage.join(folder.uri, "manifest.json"))
    assert folder.open(other, overwrite=True) == "finished"
    assert len(storage.list_shards(folder.uri)) == 1


def test_a_run_that_wrote_no_shard_is_in_nobody_s_way(folder):
    folder.open(IDENTITY)
    other = IDENTITY | {"stage": "score"}
    assert folder.open(other) == "new"
    assert folder.open(other) == "resume"
    folder.write_shard(rows(1), None, record(1))
    with pytest.raises(UserError, match="different run"):
        folder.open(IDENTITY)


def test_a_training_without_a_checkpoint_is_in_nobody_s_way(folder):
    run, other = IDENTITY | {"stage": "train"}, IDENTITY | {"stage": "train", "config": {}}
    folder.open(run)
    kept = storage.join(folder.uri, "checkpoints", "run")
    for name in (".validate_storage_marker", "checkpoint_manager_snapshot.json"):  # what Ray Train leaves at first
        storage.write_bytes(b"", storage.join(kept, name))
    assert folder.look(other) == "new"
    storage.write_bytes(b"", storage.join(kept, "checkpoint_2026-11-28_12-00-00.000000", "trainer_state.json"))
    with pytest.raises(UserError, match="different run"):
        folder.look(other)
    assert folder.look(run) == "resume"


@pytest.mark.parametrize(
    ("stage", "left"),
    [("train", "encoded"), ("rounds", "windows"), ("export", "dataset"), ("score", "direction.safetensors.parts")],
)
def test_what_a_stage_has_beside_its_shards_goes_with_it(folder, stage, left):
    """Else the next run takes it for its own, or its own stage refuses it."""
    folder.open(IDENTITY | {"stage": stage})
    for name in (left, "notes"):
        storage.write_json({}, storage.join(folder.uri, name, "run.json"))
    assert folder.open(IDENTITY | {"stage": stage, "config": {}}) == "new"
    assert left not in names(folder) and "notes" in names(folder)
    storage.write_json({}, storage.join(folder.uri, left, "run.json"))
    folder.clear()
    assert left not in names(folder) and "notes" in names(folder)


def test_many_differences_are_cut(folder):
    folder.open({"config": {str(number): 0 for number in range(8)}})
    folder.write_shard(rows(1), None, record(1))
    with pytest.raises(UserError, match="and 3 more"):
        folder.open({"config": {str(number): 1 for number in range(8)}})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_no_run_made_is_left_alone(folder, overwrite):
    storage.write_bytes(b"thesis", storage.join(folder.uri, "data", "thesis.tex"))
    with pytest.raises(UserError, match="no alphatoken run wrote"):
        folder.open(IDENTITY, overwrite)
    assert names(folder, "data") == ["thesis.tex"]


def test_tuples_count_as_lists(folder):
    folder.open({"config": {"a": (1, 2)}})
    assert folder.open({"config": {"a": (1, 2)}}) == "resume"
