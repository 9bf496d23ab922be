"""The life of an output folder: new, resumed after a kill, finished.

    OUT/run.json                              what run this is (configuration, fingerprints); written first
    OUT/data/train-<first row id>.parquet     the rows; 15 digits, so that names sort as numbers
    OUT/quarantine/quarantine-<...>.parquet   rows left out, with reasons
    OUT/token_classes.parquet                 what each token id is
    OUT/direction.safetensors                 where score made its own; .quarantine.parquet: validation rows left out
    OUT/commits/<first row id>.json           one per finished shard; gone once the run is finished
    OUT/attempts/<first row id>.json          one per block that is being scored: see pipelines/poison.py
    OUT/sums/<number>.safetensors             gradients that were added up so far: see pipelines/kept_sum.py
    OUT/README.md                             data card
    OUT/manifest.json                         what came out; written last: a folder with it is complete

A shard counts only once its commit record is there, so a killed writer leaves nothing that a reader or a resumed run
could mistake for a result.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from alphatoken import storage
from alphatoken.errors import UserError

ROOT_FILES = (
    "run.json", "manifest.json", "README.md", "token_classes.parquet", "direction.safetensors",
    "direction.safetensors.quarantine.parquet",
)  # fmt: skip
SHARD_FILES = {
    "data": re.compile(r"^train-([0-9]{15})\.parquet$"),
    "quarantine": re.compile(r"^quarantine-([0-9]{15})\.parquet$"),
    "commits": re.compile(r"^([0-9]{15})\.json$"),
    "attempts": re.compile(r"^([0-9]{15})\.json$"),
    "sums": re.compile(r"^([0-9]{15})\.safetensors$"),
}
BESIDE_SHARDS = {  # files and folders that these stages have beside the others
    "score": ("direction.safetensors.parts",),
    "train": ("metrics.jsonl", "evaluation.parquet", "checkpoints", "encoded", "windows", "model", "adapter"),
    "export": ("dataset",),
}
BESIDE_SHARDS["rounds"] = BESIDE_SHARDS["train"]
CHECKPOINT = re.compile(r"^checkpoint_[0-9]")  # Ray Train's folders, not the list of them that lies beside
SHOWN_DIFFERENCES = 5

UNKNOWN = object()  # in an identity: what only a loaded model could tell

State = Literal["new", "resume", "finished"]


def row_id_runs(row_ids: np.ndarray | list[int]) -> list[list[int]]:
    """Row ids (any order, no repeats needed) as sorted runs [[first, last], ...] of consecutive numbers."""
    ids = np.unique(np.asarray(row_ids, dtype=np.int64))
    if not len(ids):
        return []
    breaks = np.flatnonzero(np.diff(ids) != 1)
    firsts = ids[np.concatenate([[0], breaks + 1])]
    lasts = ids[np.concatenate([breaks, [len(ids) - 1]])]
    return np.stack([firsts, lasts], axis=1).tolist()


def merge_runs(runs: list[list[int]]) -> list[list[int]]:
    """Sorted runs without overlaps; neighbours become one."""
    if not runs:
        return []
    array = np.array(sorted(runs), dtype=np.int64)  # (runs, 2)
    reach = np.maximum.accumulate(array[:, 1])  # the highest id of this run and all before
    starts = np.concatenate([[0], np.flatnonzero(array[1:, 0] > reach[:-1] + 1) + 1])
    ends = np.concatenate([starts[1:] - 1, [len(array) - 1]])
    return np.stack([array[starts, 0], reach[ends]], axis=1).tolist()


class RunFolder:
    """An output folder by local path or URI. Cheap to make: open it once on the driver, write shards anywhere."""

    def __init__(self, uri: str):
        self.uri = uri

    def open(self, identity: dict, overwrite: bool = False) -> State:
        """Prepare the folder for the run that `identity` describes (JSON values).

        'finished': the same run ended here. 'resume': the same run was cut off; what it did not commit is removed.
        'new': everything else that may be written to, also after another run without any result. Raises UserError
        where another run's results are in the way (unless `overwrite`, which leaves the same run's alone: a job that
        is started again and again has to end) and where files are that no run wrote (always: they are not ours to
        delete).
        """
        state = self.look(identity, overwrite)
        if state == "new":
            self.clear()
            storage.write_json(identity, self._path("run.json"))
        elif state == "finished":
            self._remove_records()  # left where the run was killed just after its manifest
        else:
            self._remove_orphans()
        return state

    def clear(self) -> None:
        """Remove what a run left here, the same run's too; nothing happens where none has."""
        if storage.exists(self._path("run.json")):
            self._remove_own_files()

    def look(self, identity: dict, overwrite: bool = False) -> State:
        """What `open` would return or raise; nothing is changed. UNKNOWN in `identity` agrees with any value."""
        earlier = self._earlier_identity()
        if earlier is None:
            return "new"
        changed = list(differences(earlier, identity))
        if changed and self._has_results() and not overwrite:
            raise UserError(different_run(self.uri, changed))
        if changed:
            return "new"
        return "finished" if storage.exists(self._path("manifest.json")) else "resume"

    def write_shard(self, data: pa.Table | None, quarantine: pa.Table | None, record: dict) -> None:
        """Write one shard's rows and rejected rows (None or empty: no file), then its commit record.

        `record` needs `first_row_id` (names the shard) and `row_ids` (runs of all rows that it finishes). Writing the
        same shard again, as a retried task does, replaces it.
        """
        number = _digits(record["first_row_id"])
        _ = record["row_ids"]
        self._write_or_remove(quarantine, self._path("quarantine", f"quarantine-{number}.parquet"))
        self._write_or_remove(data, self._path("data", f"train-{number}.parquet"))
        storage.write_json(record, self._path("commits", f"{number}.json"))

    def commits(self) -> list[dict]:
        """Commit records of the finished shards, in order of their first row id. Empty after `finish`."""
        return storage.read_json_files([self._path("commits", name) for _, name in self._shard_files("commits")])

    def finished_row_ids(self) -> list[list[int]]:
        """All committed row ids as merged, sorted runs [[first, last], ...]."""
        return merge_runs([run for record in self.commits() for run in record["row_ids"]])

    def finish(self, manifest: dict, card: str) -> None:
        """Data card, then the manifest; only then do the commit records go."""
        storage.write_bytes(card.encode(), self._path("README.md"))
        storage.write_json(manifest, self._path("manifest.json"))
        self._remove_records()

    def manifest(self) -> dict:
        """UserError if the run has not finished."""
        return storage.read_json(self._path("manifest.json"))

    def sum_uri(self, number: int) -> str:
        """Where a sum is kept."""
        return self._path("sums", f"{_digits(number)}.safetensors")

    def _path(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    def _earlier_identity(self) -> dict | None:
        """What run.json says; None for an empty folder; UserError for a folder that no run made."""
        names = [name for name in storage.list_names(self.uri) if not storage.TEMPORARY_PATTERN.match(name)]
        if "run.json" in names:
            return storage.read_json(self._path("run.json"))
        if names:
            raise UserError(
                f"{self.uri} already holds files that no alphatoken run wrote ({', '.join(names[:3])}); "
                "give a new or empty folder as --output"
            )
        return None

    def _has_results(self) -> bool:
        """Whether anything would be lost: a run that failed before its first shard is in nobody's way."""
        # Train keeps checkpoints instead of shards. Ray Train makes their folder, with a marker, before there is one
        checkpoints = storage.list_names(self._path("checkpoints", "run"))
        return (
            storage.exists(self._path("manifest.json"))
            or any(map(CHECKPOINT.match, checkpoints))
            or any(self._shard_files(folder) for folder in ("commits", "sums"))
        )

    def _shard_files(self, folder: str) -> list[tuple[str, str]]:
        """(digits of the first row id, file name) of one of the folders in SHARD_FILES, sorted."""
        pattern = SHARD_FILES[folder]
        matches = ((pattern.match(name), name) for name in storage.list_names(self._path(folder)))
        return [(match.group(1), name) for match, name in matches if match]

    def _write_or_remove(self, table: pa.Table | None, uri: str) -> None:
        if table is not None and table.num_rows:
            storage.write_table(table, uri)
        else:
            storage.remove_file(uri)  # an earlier attempt of the same task may have had rows

    def _remove_orphans(self) -> None:
        committed = {number for number, _ in self._shard_files("commits")}
        for folder in ("data", "quarantine"):
            for number, name in self._shard_files(folder):
                if number not in committed:
                    storage.remove_file(self._path(folder, name))
        self._remove_temporary_files()

    def _remove_records(self) -> None:
        for folder in ("commits", "attempts"):
            storage.remove_tree(self._path(folder))

    def _remove_temporary_files(self) -> None:
        for folder in ("", *SHARD_FILES):
            for name in storage.list_names(self._path(folder) if folder else self.uri):
                if storage.TEMPORARY_PATTERN.match(name):
                    storage.remove_file(self._path(folder, name) if folder else self._path(name))

    def _remove_own_files(self) -> None:
        """Only files with the names that a run writes. run.json goes last: a kill in between can be repeated."""
        storage.remove_file(self._path("manifest.json"))
        for name in BESIDE_SHARDS.get(storage.read_json(self._path("run.json")).get("stage"), ()):
            storage.remove_tree(self._path(name))
        for folder in SHARD_FILES:
            for _, name in self._shard_files(folder):
                storage.remove_file(self._path(folder, name))
        self._remove_temporary_files()
        for name in reversed(ROOT_FILES):
            storage.remove_file(self._path(name))


def manifest_of(folder: str, stage: str, option: str) -> dict:
    """The manifest of a finished folder of `stage`, which the user gave as `option`. UserError where it is none."""
    uri = storage.join(folder, "manifest.json")
    if not storage.exists(uri):
        if not storage.list_names(folder):
            raise UserError(f"{folder} does not exist or is empty; give the folder that `{stage}` wrote as {option}")
        raise UserError(f"{folder} has no manifest.json: its {stage} job has not finished; run it again, it resumes")
    found = storage.read_json(uri)
    if found.get("stage") != stage:
        raise UserError(
            f"{folder} was written by {found.get('stage')}; give the folder that `{stage}` wrote as {option}"
        )
    return found


def first_row_id_of(shard: str) -> int:
    """What the name of a shard says, for an output shard under the same name."""
    found = SHARD_FILES["data"].match(storage.name_of(shard))
    assert found, "a shard's name"
    return int(found.group(1))


def _digits(first_row_id: int) -> str:
    return f"{first_row_id:015d}"


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of everything that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif new is not UNKNOWN and _plain(old) != _plain(new):
        yield name, old, new


def _plain(value: Any) -> Any:
    """Tuples come back from JSON as lists."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def different_run(uri: str, changed: list[tuple[str, Any, Any]]) -> str:
    """The sentence for what `differences` found."""
    shown = [f"{name}: {old} -> {new}" for name, old, new in changed[:SHOWN_DIFFERENCES]]
    if len(changed) > SHOWN_DIFFERENCES:
        shown.append(f"and {len(changed) - SHOWN_DIFFERENCES} more")
    return (
        f"{uri} holds the output of a different run ({'; '.join(shown)}); "
        "give another --output, or --overwrite to replace it"
    )
