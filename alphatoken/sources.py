"""From what the user passes as `--data` to units of reading: JSONL (.gz), Parquet, folders, globs, URIs, data sets.

`plan_units` finds the files and stops the job early where something is wrong. `read_unit` streams one unit.
"""

import hashlib
import json
import os
import re
from posixpath import basename
from typing import Any

import pyarrow.parquet as pq

from alphatoken import retries
from alphatoken.errors import UserError, first_line
from alphatoken.readers import (
    BYTE_ORDER_MARK,
    ROWS_PER_FILE,
    UNREADABLE,
    ReadUnit,
    SourceRow,
    column_names,
    first_row,
    first_rows,
    load_data_set,
    open_input,
    read_unit,
)
from alphatoken.storage import absolute, filesystem, is_inside

__all__ = [
    "ReadUnit", "SourceRow", "column_names", "data_fingerprint", "file_bytes", "first_row", "first_rows", "plan_units",
    "read_unit",
]  # fmt: skip

EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
UNIT_ROWS = 10_000  # rows of a data set, or at least this many of a Parquet file, per unit
HASHED_BYTES = 64 * 2**20  # larger files are fingerprinted by size and what the file system knows of their content
# What file systems call it; blob_id, xet_hash, last_commit: hf://.
OF_CONTENT = (
    "blob_id", "xet_hash", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "last_commit"
)  # fmt: skip
MANIFEST_BYTES = 16 * 2**20  # ours are much smaller
DATA_SET_NAME = re.compile(r"(?P<name>[^:*?\[\]]+?)(?::(?P<split>.+))?")
# JSON files that Hugging Face puts beside the data
METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

Input = tuple[str, str]  # (kind, path) of a ReadUnit


def plan_units(sources: list[str]) -> list[ReadUnit]:
    """The units of all sources, files in the order of their paths, each file once. Same input, same plan.

    A source is a file, glob or URI; a folder (all data files below it; of a folder that alphatoken wrote only data/);
    a folder that datasets saved; or a datasets name. Data sets take `:split` (default train). Raises UserError.
    """
    if not sources:
        raise UserError("No data files were given: pass at least one file, folder or data set name.")
    load_data_set.cache_clear()  # the folder may have been written again since the last plan
    inputs = sorted({found for source in sources for found in _resolve(source)}, key=lambda found: found[::-1])
    once: dict[Input, Input] = {}
    for found in inputs:
        once.setdefault(_without_links(*found), found)
    return [unit for index, (kind, path) in enumerate(once.values()) for unit in _units_of_input(kind, path, index)]


def check_outside(output: str, sources: list[str]) -> None:
    """Raises UserError where an output would lie in a folder whose files are data: it would be read as data, too."""
    for source in sources:
        fs, path = filesystem(source)
        if is_inside(absolute(output), absolute(source)) and fs.isdir(path) and not _is_own(fs, path.rstrip("/")):
            raise UserError(
                f"--output {output} lies in the data folder {source}, so it would be read as data itself; give a place "
                "outside of it"
            )


def data_fingerprint(sources_or_units: list[str] | list[ReadUnit]) -> str:
    """sha256 of file names (without folders), sizes and contents; the contents of files above 64 MB are replaced by
    what the file system knows, where it does: etag, modification time or another. Data sets count by their own
    fingerprint and length.
    """
    units = [item for item in sources_or_units if isinstance(item, ReadUnit)]
    units = units or plan_units([item for item in sources_or_units if isinstance(item, str)])
    digest = hashlib.sha256()
    for kind, path in sorted({(unit.kind, unit.path) for unit in units}, key=lambda found: found[::-1]):
        digest.update(f"{kind}\0{basename(path)}\0".encode())
        if kind in ("saved", "named"):
            data_set = load_data_set(kind, path)
            digest.update(f"{data_set._fingerprint}\0{len(data_set)}\0".encode())
        else:
            digest = _with_content(digest, path)
    return digest.hexdigest()


def file_bytes(units: list[ReadUnit], *kinds: str) -> int:
    """Size of the units' files of these kinds (jsonl, parquet), each file once. One of unknown size counts nothing."""
    files = {unit.path for unit in units if unit.kind in kinds}
    return sum(fs.size(inner) or 0 for fs, inner in map(filesystem, sorted(files)))


def _with_content(digest: Any, path: str) -> Any:
    """The digest with a file's size and content."""
    fs, inner = filesystem(path)

    def hashed() -> Any:
        result, info = digest.copy(), fs.info(inner)
        result.update(f"{info['size']}\0".encode())
        known = next((info[key] for key in OF_CONTENT if info.get(key)), None)
        if known and info["size"] > HASHED_BYTES:
            result.update(str(known).encode())
            return result
        with fs.open(inner, "rb") as stream:
            while block := stream.read(2**20):
                result.update(block)
        return result

    try:
        return retries.retried(hashed, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}.") from error


# sources -> (kind, path)


def _resolve(source: str) -> list[Input]:
    """Every file or data set that a source stands for."""
    fs, path = filesystem(source)
    try:
        if fs.exists(path):
            found = _resolve_path(fs, path)
        elif any(mark in path.partition(":")[0] for mark in "*?[") or "://" in source:
            found = [entry for hit in sorted(fs.glob(path)) for entry in _resolve_path(fs, hit)]
        elif (name := DATA_SET_NAME.fullmatch(source)) and not source.endswith(EXTENSIONS):
            found = [_resolve_data_set(fs, name["name"], name["split"])]
        else:
            found = []
    except OSError as error:
        raise UserError(f"{source} cannot be read: {first_line(error)}.") from error
    if not found:
        raise UserError(f"No data file matches {source}: check the path; {', '.join(EXTENSIONS)} files are read.")
    return found


def _resolve_path(fs: Any, path: str) -> list[Input]:
    if not fs.isdir(path):
        return [_file_input(fs, path)]
    if _is_saved(fs, path):
        return [_resolve_data_set(fs, path, None)]
    base = path.rstrip("/")
    if _has_stage(fs, f"{base}/run.json") and not fs.exists(f"{base}/manifest.json"):
        raise UserError(
            f"{path} has no manifest.json: the job that writes it has not finished; run it again, it resumes."
        )
    if _is_own(fs, base):
        base += "/data"  # the rest of it is not rows
    files = fs.find(base) if fs.isdir(base) else []
    return [_file_input(fs, file) for file in files if _is_data_file(file[len(base) :])]


def _is_own(fs: Any, folder: str) -> bool:
    """Whether alphatoken wrote the folder."""
    return any(_has_stage(fs, f"{folder}/{name}") for name in ("run.json", "manifest.json"))


def _has_stage(fs: Any, path: str) -> bool:
    """Whether it is the run.json or manifest.json of a run. Others have files of these names too, data even."""
    if not fs.isfile(path):
        return False
    with fs.open(path, "rb") as stream:
        start = stream.read(MANIFEST_BYTES)
    try:
        content = json.loads(start)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("stage"), str)


def _is_data_file(path: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.split("/"))
    return path.endswith(EXTENSIONS) and not hidden and basename(path) not in METADATA_FILES


def _file_input(fs: Any, path: str) -> Input:
    if not path.endswith(EXTENSIONS):
        raise UserError(f"{path} is not a data file by its name: {', '.join(EXTENSIONS)} files are read.")
    if not _is_unicode(path):  # rows carry the name of their file as text
        shown = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
        raise UserError(f"The file name {shown} is not valid UTF-8: rename the file.")
    return ("parquet" if path.endswith(".parquet") else "jsonl"), _uri(fs, path)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _uri(fs: Any, path: str) -> str:
    """Absolute local path or full URI, so that a worker with another working directory finds the file."""
    if "file" not in fs.protocol:
        return fs.unstrip_protocol(path)
    path = fs._strip_protocol(path)
    plain = os.path.normpath(path)
    return plain if os.path.realpath(plain) == os.path.realpath(path) else path  # .. behind a link is elsewhere


def _without_links(kind: str, path: str) -> Input:
    """The same for the same local file or saved folder, whatever leads to it."""
    if kind == "named" or not path.startswith("/"):
        return kind, path
    place, colon, split = path.rpartition(":") if kind == "saved" else (path, "", "")
    return kind, os.path.realpath(place) + colon + split


def _is_saved(fs: Any, folder: str) -> bool:
    """Whether datasets' save_to_disk wrote the folder."""
    return fs.exists(f"{folder}/dataset_dict.json") or (
        fs.exists(f"{folder}/state.json") and fs.exists(f"{folder}/dataset_info.json")
    )


def _resolve_data_set(fs: Any, name: str, split: str | None) -> Input:
    """A folder that datasets saved, else a data set by name."""
    if not (fs.isdir(name) and _is_saved(fs, name)):
        return "named", f"{name}:{split or 'train'}"
    if not fs.exists(f"{name}/dataset_dict.json"):
        return "saved", f"{_uri(fs, name)}:"
    splits = json.loads(fs.cat_file(f"{name}/dataset_dict.json"))["splits"]
    split = split or ("train" if len(splits) > 1 else splits[0])
    if split not in splits:
        raise UserError(f"{name} has no split {split}: choose one as {name}:SPLIT ({', '.join(splits)}).")
    return "saved", f"{_uri(fs, name)}:{split}"


# (kind, path) -> units


def _units_of_input(kind: str, path: str, index: int) -> list[ReadUnit]:
    if kind == "jsonl":
        _check_jsonl(path)
        return [ReadUnit(kind, path, index, 0, 0)]
    if kind == "parquet":
        return [ReadUnit(kind, path, index, start, stop) for start, stop in _row_group_ranges(path)]
    rows = len(load_data_set(kind, path))
    _check_row_count(path, rows)
    return [ReadUnit(kind, path, index, start, min(start + UNIT_ROWS, rows)) for start in range(0, rows, UNIT_ROWS)]


def _check_row_count(path: str, rows: int) -> None:
    if rows == 0:
        raise UserError(f"{path} has no rows: remove it from the data files.")
    if rows >= ROWS_PER_FILE:
        raise UserError(f"{path} has {rows} rows: split it into files of fewer than {ROWS_PER_FILE}.")


def _check_jsonl(path: str) -> None:
    fs, inner = filesystem(path)
    if fs.size(inner) == 0:
        raise UserError(f"{path} is empty (0 bytes): remove it from the data files.")
    with open_input(path) as stream:
        try:
            start = stream.read(1024).removeprefix(BYTE_ORDER_MARK).lstrip()
        except EOFError:  # cut off early: reading reports where
            return
        except UNREADABLE as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}.") from error
    if start.startswith(b"["):
        raise UserError(f"{path} is one JSON array: write it as JSON lines, one object per line (jq -c '.[]').")


def _row_group_ranges(path: str) -> list[tuple[int, int]]:
    """Runs of row groups with UNIT_ROWS rows or more each."""
    with open_input(path) as stream:
        try:
            metadata = pq.ParquetFile(stream).metadata
        except UNREADABLE as error:
            raise UserError(f"{path} is not a Parquet file that can be read: {first_line(error)}.") from error
    _check_row_count(path, metadata.num_rows)
    ranges, start, rows = [], 0, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= UNIT_ROWS or group == metadata.num_row_groups - 1:
            ranges.append((start, group + 1))
            start, rows = group + 1, 0
    return ranges
