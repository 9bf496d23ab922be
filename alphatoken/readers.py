"""Reading one piece of the input as a stream of rows. Bad data never raises: it becomes a `SourceRow` with a reason.

Memory stays bounded whatever a file holds: lines above MAX_LINE_BYTES are skipped in small pieces, not parsed.
"""

import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken import retries
from alphatoken.errors import UserError, first_line

ROWS_PER_FILE = 10**9  # row_id = file_index * ROWS_PER_FILE + position
READ_ROWS = 256  # rows held in memory at once
MAX_LINE_BYTES = 16 * 2**20  # of JSON lines; as Python objects a line can be 20 times as large
BUFFER_BYTES = 2**20
MAX_NESTING = 100  # lists and objects inside each other in a row
FIRST_ROWS = 1000  # rows looked at for one that can be read
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError)

Item = tuple[int, dict | None, str | None]  # (position, data, error); a blank line is (position, None, None)


@dataclass(frozen=True)
class ReadUnit:
    """A piece of the input that one task reads in order.

    kind: jsonl (the whole file), parquet (start, stop: row groups), saved (a save_to_disk folder; start, stop: rows) or
    named (a datasets name; start, stop: rows). path: absolute path, URI or, for data sets, `name:split`.
    """

    kind: str
    path: str
    file_index: int
    start: int
    stop: int  # jsonl: 0, the length is not known


@dataclass(frozen=True)
class SourceRow:
    """One input row, or the reason why it could not be read (then `data` is None).

    position: row number in the file from 0; for JSONL the line number, so blank lines are skipped but counted.
    """

    row_id: int
    source: str
    position: int
    data: dict | None
    error: str | None


def read_unit(unit: ReadUnit) -> Iterator[SourceRow]:
    """The rows of a unit in order, in constant memory. Bad rows come with `error`, those of a damaged Parquet row group
    too; where the rest of another file cannot be read, one row with `error` says so and reading ends. Raises UserError
    where the file can no longer be opened, or its storage does not answer.
    """
    source = unit.path.removesuffix(":")  # a saved data set without splits
    for position, data, error in _persistent_items(unit):
        if position >= ROWS_PER_FILE:
            raise UserError(f"{source} has more than {ROWS_PER_FILE} rows: split it into smaller files.")
        if data is not None or error is not None:
            yield SourceRow(unit.file_index * ROWS_PER_FILE + position, source, position, data, error)


def first_row(unit: ReadUnit) -> dict:
    """The first row that can be read. Raises UserError where there is none."""
    reason = None
    for row in itertools.islice(read_unit(unit), FIRST_ROWS):
        if row.data is not None:
            return row.data
        reason = reason or row.error
    if reason is None:
        raise UserError(f"{unit.path} has no rows: remove it from the data files.")
    raise UserError(f"No row of {unit.path} can be read: check the file. The first problem: {reason}.")


def first_rows(units: Iterable[ReadUnit]) -> Iterator[tuple[ReadUnit, dict]]:
    """(first unit, first row that can be read) of each file, in the order of the files. UserError as `first_row`."""
    firsts = {unit.file_index: unit for unit in reversed(list(units))}
    return ((unit, first_row(unit)) for _, unit in sorted(firsts.items()))


def column_names(unit: ReadUnit) -> set[str]:
    """The columns of the first row that can be read. Raises UserError where there is none."""
    return set(first_row(unit))


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """The (decompressed) bytes of a file. Raises UserError where it cannot be opened."""
    file = fsspec.open(path, "rb", compression="gzip" if path.endswith(".gz") else None)
    try:
        stream = retries.retried(file.open, path)
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {first_line(error)}.") from error
    try:
        yield stream
    finally:
        file.close()


@lru_cache(maxsize=4)
def load_data_set(kind: str, path: str) -> Any:
    """A datasets Dataset by `name:split`. Kept, because every unit of it asks again. Raises UserError."""
    import datasets

    name, _, split = path.partition(":") if kind == "named" else path.rpartition(":")  # train[:10%]; s3://bucket/x:
    try:
        if kind == "named":
            return datasets.load_dataset(name, split=split)
        data_set = datasets.load_from_disk(name)
        return data_set[split] if isinstance(data_set, datasets.DatasetDict) else data_set
    except Exception as error:  # datasets raises whatever its loaders raise
        where = (
            f"No file or folder is called {name}, and as a data set"
            if kind == "named"
            else f"{name} is a saved data set, but"
        )
        raise UserError(f"{where} (split {split or 'none'}) it cannot be loaded: {first_line(error)}.") from error


def _persistent_items(unit: ReadUnit) -> Iterator[Item]:
    """The items of a unit. Where its storage fails for a moment it is opened again and read on from the same place."""
    next_position, failures = 0, 0
    while True:
        try:
            for item in _READERS[unit.kind](unit):
                if item[0] >= next_position:
                    next_position, failures = item[0] + 1, 0
                    yield item
            return
        except Exception as error:
            if not retries.is_transient(error):
                if retries.is_refused(error):
                    raise _unanswered(unit, error) from error
                raise
            failures += 1
            if failures == retries.ATTEMPTS:
                if "://" not in unit.path:  # a damaged disk: other files and blocks of it can be read
                    yield next_position, None, f"the file cannot be read from here on: {first_line(error)}"
                    return
                raise _unanswered(unit, error) from error
        retries.wait(failures)


def _unanswered(unit: ReadUnit, error: BaseException) -> UserError:
    return UserError(
        f"{unit.path} cannot be read ({first_line(error)}): once its storage answers, run the same command again: it "
        "resumes."
    )


def _read_jsonl(unit: ReadUnit) -> Iterator[Item]:
    with open_input(unit.path) as stream:
        # Remote files of fsspec have a readline without a limit.
        raw: Any = stream
        buffered: Any = raw if isinstance(raw, io.BufferedIOBase) else io.BufferedReader(raw, BUFFER_BYTES)
        yield from _stop_where_unreadable(_parsed_lines(buffered), 0)


def _read_parquet(unit: ReadUnit) -> Iterator[Item]:
    with open_input(unit.path) as stream:
        try:
            file = pq.ParquetFile(stream)
        except UNREADABLE as error:
            if retries.is_transient(error):
                raise
            raise UserError(f"{unit.path} changed since it was planned: {first_line(error)}.") from error
        start = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        for group in range(unit.start, unit.stop):
            yield from _read_row_group(file, group, start)
            start += file.metadata.row_group(group).num_rows


def _read_row_group(file: pq.ParquetFile, group: int, position: int) -> Iterator[Item]:
    """The rows of a group; where it is damaged, the reason for each that is left of it. Other groups can be read."""
    stop = position + file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(READ_ROWS, row_groups=[group]):
            for row in _python_rows(batch):
                yield position, *row
                position += 1
    except UNREADABLE as error:
        _raise_fault_of_storage(error)
        reason = f"the rest of row group {group} cannot be read: {first_line(error)}"
        yield from ((left, None, reason) for left in range(position, stop))


def _python_rows(batch: pa.RecordBatch) -> Iterator[tuple[dict | None, str | None]]:
    """(row, None), or (None, reason) for a row with a value that Python cannot hold, such as text that is not UTF-8."""
    try:
        rows = batch.to_pylist()
    except Exception:  # whatever Python's types raise: one row spoils them all
        for index in range(batch.num_rows):
            yield _python_row(batch.slice(index, 1))
    else:
        yield from ((row, None) for row in rows)


def _python_row(batch: pa.RecordBatch) -> tuple[dict | None, str | None]:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except Exception as error:
            return None, f"the column {name} cannot be read: {first_line(error)}"
    return row, None


def _read_data_set(unit: ReadUnit) -> Iterator[Item]:
    data_set = load_data_set(unit.kind, unit.path)
    position = unit.start
    while position < unit.stop:
        try:
            for row in data_set.select(range(position, unit.stop)):
                yield position, row, None
                position += 1
        except Exception as error:  # datasets raises whatever its decoders raise
            if retries.is_transient(error):
                raise
            yield position, None, f"the row cannot be read: {first_line(error)}"
            position += 1


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet, "saved": _read_data_set, "named": _read_data_set}


def _stop_where_unreadable(items: Iterator[Item], position: int) -> Iterator[Item]:
    """The items; where the file is damaged, one item that says so, at the position that would have come next."""
    try:
        for item in items:
            yield item
            position = item[0] + 1
    except UNREADABLE as error:
        _raise_fault_of_storage(error)
        yield position, None, f"the file cannot be read from here on: {first_line(error)}"


def _raise_fault_of_storage(error: Exception) -> None:
    """It may be gone at the next attempt, and the rows are there."""
    if retries.is_transient(error) or retries.is_refused(error):
        raise error


def _parsed_lines(stream: IO[bytes]) -> Iterator[Item]:
    position = 0
    while line := stream.readline(MAX_LINE_BYTES):
        line = line.removeprefix(BYTE_ORDER_MARK)  # at every line: files may have been joined
        if _skip_rest_of_line(stream, line):
            yield position, None, f"the line is longer than {MAX_LINE_BYTES} bytes"
        elif line.strip():
            yield position, *_parse_line(line)
        else:
            yield position, None, None
        position += 1


def _skip_rest_of_line(stream: IO[bytes], line: bytes) -> bool:
    """Reads on to the end of a line that was too long to hold; whether there was anything left of it."""
    skipped = False
    while line and not line.endswith(b"\n") and (line := stream.readline(BUFFER_BYTES)):
        skipped = True
    return skipped


def _parse_line(line: bytes) -> tuple[dict | None, str | None]:
    """(object, None), or (None, reason)."""
    try:
        data = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # an escaped half of a surrogate pair is valid JSON, but not text
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return None, f"invalid UTF-8 at byte {error.start} of the line"
    except UnicodeEncodeError:
        return None, "the text holds half of a surrogate pair, which is not valid Unicode"
    except RecursionError:
        return None, "the JSON is nested too deeply"
    except json.JSONDecodeError as error:  # a line of the file is the whole text: its own number would mislead
        return None, f"invalid JSON: {error.msg} at character {error.pos + 1}"
    except ValueError as error:
        return None, f"invalid JSON: {error}"
    if not isinstance(data, dict):
        return None, f"the line is a JSON {type(data).__name__}, not an object"
    if line.count(b"{") + line.count(b"[") > MAX_NESTING and _is_deep(data):
        return None, f"the JSON is nested too deeply: more than {MAX_NESTING} lists and objects inside each other"
    return data, None


def _is_deep(data: dict) -> bool:
    """Without recursion, which such a row would exhaust here or in a later step."""
    level: list[Any] = [data]
    for _ in range(MAX_NESTING):
        items = (item for found in level for item in (found.values() if isinstance(found, dict) else found))
        level = [item for item in items if isinstance(item, dict | list)]
    return bool(level)
