"""Files by local path or any fsspec URI: s3://, gs://, abfs://, memory:// ...

Every write is atomic: readers see the whole file or none. On file systems that means a temporary name, then a rename;
on object stores one put, which is atomic by itself. All that is here may be repeated, and is where storage fails for a
moment (see retries.py); a full disk is a UserError.
"""

import json
import os
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from alphatoken.errors import UserError, first_line
from alphatoken.retries import retried

Result = TypeVar("Result")

DATA_PATTERN = re.compile(r"^train-[0-9]+\.parquet$")
TEMPORARY_PATTERN = re.compile(r"^\..+\.[0-9a-f]{32}\.tmp$")

# A put on these either replaces the whole object or does nothing.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "hf", "memory"})


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that a URI names and the path in it; UserError where its driver is missing or unknown."""
    try:
        return url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise UserError(f"{uri} cannot be opened: {first_line(error)}; is its fsspec driver installed?") from error


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`, whatever slashes they end or begin with."""
    base = uri if uri.endswith("://") else uri.rstrip("/") + "/"
    return base + "/".join(part.strip("/") for part in parts)


def absolute(uri: str) -> str:
    """The same place, independent of the working folder: workers on other machines have another one."""
    fs, path = filesystem(uri)
    return os.path.normpath(path) if isinstance(fs, LocalFileSystem) else uri


def is_local(uri: str) -> bool:
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def name_of(uri: str) -> str:
    """The last part of a path."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)

    def look() -> bool:
        fs.invalidate_cache()
        try:
            fs.info(path)  # fs.exists takes any failure for a no
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    return retried(look, uri)


def same_place(first: str, second: str) -> bool:
    """True where two URIs name one folder."""
    return _place(first) == _place(second)


def is_inside(place: str, folder: str) -> bool:
    """True where a URI names a folder or something in it."""
    (kind, path), (other, base) = _place(place), _place(folder)
    return kind is other and f"{path}/".startswith(f"{base}/")


def _place(uri: str) -> tuple[type, str]:
    """The same for the same place, whatever leads to it."""
    fs, path = filesystem(uri)
    return type(fs), (os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path).rstrip("/")


def list_names(folder: str) -> list[str]:
    """Sorted names (files and folders) directly in a folder; empty where it does not exist.

    Raises UserError if it is a file.
    """
    fs, path = filesystem(folder)

    def look() -> list[str]:
        fs.invalidate_cache()
        if fs.isfile(path):
            raise UserError(f"{folder} is a file, not a folder; give a folder")
        try:
            return fs.ls(path, detail=False)
        except FileNotFoundError:
            return []

    entries = retried(look, folder)
    # Object stores may list the folder's own marker object among its content.
    return sorted(name_of(entry) for entry in entries if entry.rstrip("/") != path.rstrip("/"))


def list_shards(folder: str) -> list[str]:
    """URIs of `folder/data/train-*.parquet`, sorted; UserError if there is none."""
    names = [name for name in list_names(join(folder, "data")) if DATA_PATTERN.match(name)]
    if not names:
        raise UserError(f"{folder} has no data/train-*.parquet; give the folder that the job before this one wrote")
    return [join(folder, "data", name) for name in names]


def read_bytes(uri: str) -> bytes:
    """UserError if the file is missing."""
    fs, path = filesystem(uri)
    try:
        return retried(lambda: fs.cat_file(path), uri)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{uri} does not exist or is not a file") from error


def write_bytes(data: bytes | memoryview, uri: str) -> None:
    """Atomic. Folders above the file are made."""
    fs, path = filesystem(uri)
    if _protocols(fs) & OBJECT_STORES:
        retried(lambda: fs.pipe_file(path, bytes(data)), uri)
        return
    folder, temporary = path.rpartition("/")[0], temporary_name(path)

    def write() -> None:
        fs.makedirs(folder, exist_ok=True)
        _write_and_rename(fs, data, temporary, path)

    try:
        retried(write, uri)
    except BaseException:
        with suppress(Exception):  # what went wrong first is what counts; a resumed run removes temporary files
            fs.rm_file(temporary)
        raise


def temporary_name(path: str) -> str:
    """A new one in the same folder, which readers pass over; a path in a file system, not a URI."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"


def _write_and_rename(fs: fsspec.AbstractFileSystem, data: bytes | memoryview, temporary: str, path: str) -> None:
    local = isinstance(fs, LocalFileSystem)
    with open(temporary, "wb") if local else fs.open(temporary, "wb") as file:
        file.write(data)
        if local:  # else a power cut may leave the new name with no content
            file.flush()
            os.fsync(file.fileno())
    if local:
        os.replace(temporary, path)
    else:
        fs.mv(temporary, path)


def _protocols(fs: fsspec.AbstractFileSystem) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def read_json(uri: str) -> Any:
    """UserError if the file is missing or is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri} is not valid JSON ({error})") from error


def read_json_files(uris: list[str]) -> list[Any]:
    """Many small JSON files, fetched together where the file system can."""
    if not uris:
        return []
    fs, _ = filesystem(uris[0])
    paths = [filesystem(uri)[1] for uri in uris]
    content = retried(lambda: fs.cat(paths), uris[0].rpartition("/")[0])
    return [json.loads(content[path]) for path in paths]


def write_json(value: Any, uri: str) -> None:
    """Readable (indented) and strict: NaN and infinity are ValueErrors."""
    write_bytes((json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), uri)


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file; UserError if it is missing, broken, or lacks one of `columns`."""

    def read(file: pq.ParquetFile) -> pa.Table:
        missing = set(columns or []) - set(file.schema_arrow.names)
        if missing:
            raise UserError(f"{uri} lacks the columns {', '.join(sorted(missing))}")
        return file.read(columns=columns)

    return _of_parquet(uri, read)


def read_schema(uri: str) -> pa.Schema:
    """The columns of one Parquet file."""
    return _of_parquet(uri, lambda file: file.schema_arrow)


def count_rows(uri: str) -> int:
    """Rows of one Parquet file, from its footer."""
    return _of_parquet(uri, lambda file: file.metadata.num_rows)


def _of_parquet(uri: str, read: Callable[[pq.ParquetFile], Result]) -> Result:
    # A dataset reader would add columns for folders called key=value; a single file never does.
    fs, path = filesystem(uri)

    def attempt() -> Result:
        with pq.ParquetFile(path if isinstance(fs, LocalFileSystem) else fs.open(path, "rb")) as file:
            return read(file)

    try:
        return retried(attempt, uri)
    except FileNotFoundError as error:
        raise UserError(f"{uri} does not exist") from error
    except pa.ArrowInvalid as error:
        raise UserError(f"{uri} is not a readable Parquet file ({error})") from error


def write_table(table: pa.Table, uri: str) -> None:
    """One zstd Parquet file."""
    sink = pa.BufferOutputStream()
    repeating, floats = _leaves(table.schema)
    # Floats hardly repeat: dictionaries would cost half the writing, bytes split by place pack better.
    pq.write_table(table, sink, compression="zstd", use_dictionary=repeating, use_byte_stream_split=floats)
    write_bytes(memoryview(sink.getvalue()), uri)


def _leaves(schema: pa.Schema) -> tuple[list[str], list[str]]:
    """Parquet paths of the columns (of list columns: of their items): (all but floats, floats)."""
    repeating: list[str] = []
    floats: list[str] = []
    for field in schema:
        is_list = pa.types.is_list(field.type)
        kind = field.type.value_type if is_list else field.type
        (floats if pa.types.is_floating(kind) else repeating).append(
            f"{field.name}.list.element" if is_list else field.name
        )
    return repeating, floats


def remove_file(uri: str) -> None:
    """Nothing happens if the file is not there."""
    fs, path = filesystem(uri)
    if exists(uri):
        with suppress(FileNotFoundError):  # an attempt that seemed to fail may have removed it
            retried(lambda: fs.rm_file(path), uri)


def remove_tree(uri: str) -> None:
    """A folder with everything in it. Nothing happens if it is not there."""
    fs, path = filesystem(uri)
    if exists(uri):
        with suppress(FileNotFoundError):
            retried(lambda: fs.rm(path, recursive=True), uri)
