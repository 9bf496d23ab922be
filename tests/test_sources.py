import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphatoken import readers, sources
from alphatoken.errors import UserError
from alphatoken.sources import check_outside, column_names, data_fingerprint, plan_units, read_unit


def rows(*numbers: int) -> list[dict]:
    return [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in numbers]


def hard_to_compress(number: int) -> list[dict]:
    return [{"prompt": random.Random(index).randbytes(40).hex()} for index in range(number)]


def json_lines(data: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in data)


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def write_parquet(path: Path, data: list[dict], **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(data), path, **options)
    return str(path)


def read_all(*given: str) -> list[sources.SourceRow]:
    return [row for unit in plan_units(list(given)) for row in read_unit(unit)]


def stop_message(*given: str) -> str:
    with pytest.raises(UserError) as error:
        read_all(*given)
    return str(error.value)


# JSON lines


def test_jsonl_rows_have_ids_and_positions(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\n".join([b"\xef\xbb\xbf" + json_lines(rows(0)), b" ", json_lines(rows(1))]))
    found = read_all(path)
    assert [row.data for row in found] == rows(0, 1)
    assert [row.position for row in found] == [0, 3]  # blank lines are counted
    assert [row.row_id for row in found] == [0, 3]
    assert {row.source for row in found} == {path}
    assert {row.error for row in found} == {None}


def test_last_line_needs_no_line_break(tmp_path):
    assert [row.data for row in read_all(write(tmp_path / "a.json", json_lines(rows(0, 1)).rstrip()))] == rows(0, 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": ', "invalid JSON: "),
        (b"[1, 2]", "the line is a JSON list, not an object"),
        (b"null", "the line is a JSON NoneType, not an object"),
        (b'{"prompt": "\xff"}', "invalid UTF-8 at byte 12"),
        (b'{"prompt": "\\uD800"}', "half of a surrogate pair"),
        (b'{"a": ' + b"[" * 200_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "invalid JSON: "),
    ],
)
def test_bad_lines_come_with_a_reason_and_reading_goes_on(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", json_lines(rows(0)) + line + b"\n" + json_lines(rows(2)))
    first, bad, last = read_all(path)
    assert (first.data, last.data, last.position) == (*rows(0, 2), 2)
    assert bad.data is None
    assert bad.error.startswith(reason) or reason in bad.error
    assert (bad.position, bad.row_id) == (1, 1)


def test_whole_surrogate_pairs_are_fine(tmp_path):
    assert read_all(write(tmp_path / "a.jsonl", b'{"prompt": "\\ud83d\\ude00"}'))[0].data == {"prompt": "😀"}


@pytest.mark.parametrize("end", [b"\n" + json_lines(rows(2)), b"", b"\n"])
def test_a_line_too_long_to_hold_is_skipped(tmp_path, monkeypatch, end):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 64)
    found = read_all(write(tmp_path / "a.jsonl", json_lines(rows(0)) + b'{"prompt": "' + b"x" * 300 + b'"}' + end))
    assert found[0].data == rows(0)[0]
    assert found[1].error == "the line is longer than 64 bytes"
    assert [(row.position, row.data) for row in found[2:]] == ([(2, rows(2)[0])] if len(end) > 1 else [])


def test_gzip(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines(rows(0, 1))))
    assert [row.data for row in read_all(path)] == rows(0, 1)


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damaged_gzip_ends_with_one_error(tmp_path, damage):
    data = hard_to_compress(5000)
    content = gzip.compress(json_lines(data))
    half = len(content) // 2
    content = content[:half] if damage == "cut" else content[:half] + bytes(len(content) - half)
    *good, bad = read_all(write(tmp_path / "a.json.gz", content))
    # gzip notices overwritten bytes late: what follows them may decode to other text first
    intact = len(good) if damage == "cut" else 1000
    assert intact >= 1000
    assert [row.data for row in good[:intact]] == data[:intact]
    assert bad.error.startswith("the file cannot be read from here on: ")
    assert bad.position == len(good)


def test_gzip_cut_in_its_first_line(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines(rows(0)))[:-12])
    (unit,) = plan_units([path])
    assert [row.error is None for row in read_unit(unit)] == [False]
    with pytest.raises(UserError, match="No row of .*a.jsonl.gz can be read"):
        column_names(unit)


# Parquet


def test_parquet_row_groups_are_units(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_ROWS", 4)
    monkeypatch.setattr(readers, "READ_ROWS", 3)
    path = write_parquet(tmp_path / "a.parquet", rows(*range(11)), row_group_size=3)
    units = plan_units([path])
    assert [(unit.start, unit.stop) for unit in units] == [(0, 2), (2, 4)]
    assert [row.position for row in read_unit(units[1])] == [6, 7, 8, 9, 10]
    assert [row.data for row in read_all(path)] == rows(*range(11))


def test_every_row_of_a_damaged_row_group_is_accounted_for(tmp_path):
    """And the groups behind it are read."""
    path = tmp_path / "a.parquet"
    data = hard_to_compress(1500)
    write_parquet(path, data, row_group_size=500, compression="zstd", use_dictionary=False)
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[second.data_page_offset + 40 : second.data_page_offset + 4000] = bytes(3960)
    path.write_bytes(content)
    found = read_all(str(path))
    assert [row.position for row in found] == list(range(1500))
    bad = [row for row in found if row.error]
    assert bad and all(500 <= row.position < 1000 for row in bad) and bad[-1].position == 999
    assert all(row.error.startswith("the rest of row group 1 cannot be read: ") for row in bad)
    assert [row.data for row in found[:500] + found[1000:]] == data[:500] + data[1000:]


# Which files


def test_an_output_in_a_data_folder_is_refused(tmp_path):
    """Its files would be data the next time: held-out rows among those that are trained on."""
    write(tmp_path / "data" / "a.jsonl", json_lines(rows(0)))
    file, folder = str(tmp_path / "data" / "a.jsonl"), str(tmp_path / "data")
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, f"{folder}/out", f"{folder}/deep/out/", f"{tmp_path}/link/out"):
        with pytest.raises(UserError, match="lies in the data folder .*/data, so it would be read as data itself"):
            check_outside(place, [file, folder])
    check_outside(f"{folder}-2", [folder])
    check_outside(f"{folder}/out", [file, "hub/name"])
    (tmp_path / "data" / "run.json").write_text('{"stage": "generate"}')
    check_outside(f"{folder}/out", [folder])  # of a run's folder data/ alone is read


def test_globs_and_the_order_of_files(tmp_path):
    for name, number in (("b.jsonl", 1), ("a.jsonl", 0), ("sub/c.jsonl", 2)):
        write(tmp_path / name, json_lines(rows(number)))
    units = plan_units([f"{tmp_path}/sub/c.jsonl", f"{tmp_path}/*.jsonl", f"{tmp_path}/b.jsonl"])
    assert [Path(unit.path).name for unit in units] == ["a.jsonl", "b.jsonl", "c.jsonl"]  # b only once
    assert [unit.file_index for unit in units] == [0, 1, 2]
    assert [row.row_id for unit in units for row in read_unit(unit)] == [0, 10**9, 2 * 10**9]
    assert [row.data for row in read_all(f"{tmp_path}/**/*.jsonl")] == rows(0, 1, 2)


def test_a_file_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    file = write(tmp_path / "data" / "b.jsonl", json_lines(rows(0)))
    (tmp_path / "data" / "deep").mkdir()
    (tmp_path / "data" / "c.jsonl").symlink_to("b.jsonl")
    (tmp_path / "link").symlink_to("data/deep")
    monkeypatch.chdir(tmp_path)
    spellings = [f"{tmp_path}/data/deep/../b.jsonl", "data//b.jsonl", "./data/deep/../deep/../b.jsonl", "data"]
    for given in ([file], [spellings[0]], [spellings[1]], spellings, ["data"], [file, f"{tmp_path}/data/c.jsonl"]):
        assert [unit.path for unit in plan_units(given)] == [file]
    assert [unit.path for unit in plan_units(["data/c.jsonl"])] == [f"{tmp_path}/data/c.jsonl"]
    assert [row.data for row in read_all("link/../b.jsonl")] == rows(0)  # link/.. is data, not where link lies


def test_a_saved_folder_that_is_named_twice_is_read_once(tmp_path):
    from datasets import Dataset

    Dataset.from_list(rows(0)).save_to_disk(tmp_path / "saved")
    (tmp_path / "link").symlink_to("saved")
    given = [f"{tmp_path}/saved/../saved", f"{tmp_path}/link", f"{tmp_path}/saved"]
    assert [row.data for row in read_all(*given)] == rows(0)


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", json_lines(rows(0)))
    monkeypatch.chdir(tmp_path)
    assert plan_units(["a.jsonl"])[0].path == str(tmp_path / "a.jsonl")


def test_file_uri(tmp_path):
    write(tmp_path / "a.jsonl", json_lines(rows(0)))
    assert [row.data for row in read_all(f"file://{tmp_path}/a.jsonl")] == rows(0)


def test_memory_uri():
    fs = fsspec.filesystem("memory")
    fs.pipe("/test_sources/b.jsonl", json_lines(rows(1)))
    fs.pipe("/test_sources/a.jsonl.gz", gzip.compress(json_lines(rows(0))))
    expected = rows(0, 1)
    try:
        for given in ("memory://test_sources", "memory://test_sources/*.jsonl*"):
            units = plan_units([given])
            assert all(unit.path.startswith("memory://") for unit in units)
            assert [row.data for unit in units for row in read_unit(unit)] == expected
        assert len(data_fingerprint(["memory://test_sources"])) == 64
        assert "No data file matches memory://test_sources/c.jsonl" in stop_message("memory://test_sources/c.jsonl")
    finally:
        fs.rm("/test_sources", recursive=True)


def test_folder_of_files(tmp_path):
    write(tmp_path / "a.jsonl", json_lines(rows(0)))
    write_parquet(tmp_path / "data" / "b.parquet", rows(1))
    for other in ("README.md", "dataset_infos.json", ".hidden.jsonl", "_logs/x.jsonl"):
        write(tmp_path / other, b"{}")
    assert [row.data for row in read_all(str(tmp_path))] == rows(0, 1)
    assert [row.data for row in read_all(f"{tmp_path}/")] == rows(0, 1)


def test_folder_that_alphatoken_wrote(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000.parquet", rows(0))
    for other in ("token_classes.parquet", "quarantine/part.parquet"):
        write_parquet(tmp_path / other, rows(1))
    write(tmp_path / "run.json", b'{"stage": "score"}')
    with pytest.raises(UserError, match="has no manifest.json: the job that writes it has not finished"):
        read_all(str(tmp_path))
    write(tmp_path / "manifest.json", b'{"stage": "score"}')
    assert [row.data for row in read_all(str(tmp_path))] == rows(0)
    (tmp_path / "run.json").unlink()  # as some take folders to a hub
    assert [row.data for row in read_all(str(tmp_path))] == rows(0)


@pytest.mark.parametrize("name", ["run.json", "manifest.json"])
@pytest.mark.parametrize("content", [json_lines(rows(3)), json_lines(rows(3, 4))])
def test_folder_that_looks_as_if_alphatoken_wrote_it(tmp_path, name, content):
    """Every data file of it is read, whatever it is called."""
    write_parquet(tmp_path / "data" / "a.parquet", rows(0))
    write_parquet(tmp_path / "quarantine" / "b.parquet", rows(1))
    write_parquet(tmp_path / "token_classes.parquet", rows(2))
    write(tmp_path / name, content)
    found = [row.data["prompt"] for row in read_all(str(tmp_path))]
    assert sorted(found) == [f"question {number}" for number in range(3 + content.count(b"\n"))]


# datasets


def test_folder_that_datasets_saved(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(sources, "UNIT_ROWS", 4)
    Dataset.from_list(rows(*range(10))).save_to_disk(tmp_path / "saved")
    units = plan_units([str(tmp_path / "saved")])
    assert [(unit.start, unit.stop) for unit in units] == [(0, 4), (4, 8), (8, 10)]
    found = [row for unit in units for row in read_unit(unit)]
    assert [row.data for row in found] == rows(*range(10))
    assert [row.row_id for row in found] == list(range(10))
    assert found[0].source == str(tmp_path / "saved")
    assert data_fingerprint(units) == data_fingerprint([str(tmp_path / "saved")])


def test_saved_folder_that_was_written_again(tmp_path):
    from datasets import Dataset

    for numbers in ((0,), (1, 2)):
        Dataset.from_list(rows(*numbers)).save_to_disk(tmp_path / "saved")
        assert [row.data for row in read_all(str(tmp_path / "saved"))] == rows(*numbers)


def test_saved_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    folder = str(tmp_path / "saved")
    splits = {"train": Dataset.from_list(rows(0)), "test": Dataset.from_list(rows(1))}
    DatasetDict(splits).save_to_disk(folder)
    assert [row.data for row in read_all(folder)] == rows(0)
    assert [row.data for row in read_all(f"{folder}:test")] == rows(1)
    assert f"has no split dev: choose one as {folder}:SPLIT (train, test)" in stop_message(f"{folder}:dev")
    DatasetDict({"test": splits["test"]}).save_to_disk(str(tmp_path / "one"))
    assert [row.data for row in read_all(str(tmp_path / "one"))] == rows(1)


def test_data_set_by_name(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows(0, 1))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.data for row in read_all("someone/some-set")] == rows(0, 1)
    assert read_all("someone/some-set:train[:10%]")[0].source == "someone/some-set:train[:10%]"
    assert asked == [("someone/some-set", "train"), ("someone/some-set", "train[:10%]")]


def test_data_set_that_is_not_found(monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist.\nMore.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = stop_message("someone/no-such-set")
    assert "someone/no-such-set" in message
    assert "doesn't exist." in message
    assert "\n" not in message


# What stops the job before any work


def test_what_cannot_be_read_stops_the_job(tmp_path):
    def at(name: str, content: bytes) -> str:
        return stop_message(write(tmp_path / name, content))

    assert "No data files were given" in stop_message()
    assert "No data file matches" in stop_message(f"{tmp_path}/*.jsonl")
    assert "No data file matches" in stop_message(f"{tmp_path}/a.jsonl")
    assert "cannot be opened: Protocol not known" in stop_message("nowhere://a.jsonl")
    (tmp_path / "empty").mkdir()
    assert "No data file matches" in stop_message(f"{tmp_path}/empty")
    assert "0.jsonl is empty (0 bytes)" in at("0.jsonl", b"")
    assert ".jsonl, .json, .jsonl.gz" in at("a.csv", b"a,b")
    assert "is not a Parquet file that can be read" in at("a.parquet", b"PAR1 no")
    assert "is one JSON array" in at("a.json", b' [\n{"prompt": "a"}]')
    assert "cannot be read: Not a gzipped file" in at("a.jsonl.gz", b'{"prompt": "a"}')
    no_rows = pa.table({"prompt": pa.array([], pa.string())})
    pq.write_table(no_rows, tmp_path / "none.parquet")
    assert "none.parquet has no rows" in stop_message(f"{tmp_path}/none.parquet")


def test_a_file_that_is_gone_stops_the_job(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(rows(0)))
    (unit,) = plan_units([path])
    os.remove(path)
    with pytest.raises(UserError, match="a.jsonl cannot be opened"):
        list(read_unit(unit))


def test_column_names_come_from_the_first_row_that_can_be_read(tmp_path):
    (unit,) = plan_units([write(tmp_path / "a.jsonl", b"\nnot json\n" + json_lines(rows(0)))])
    assert column_names(unit) == {"prompt", "completion"}
    (unit,) = plan_units([write(tmp_path / "b.jsonl", b"not json\n")])
    with pytest.raises(UserError, match="No row of .*b.jsonl can be read.*invalid JSON"):
        column_names(unit)
    (unit,) = plan_units([write(tmp_path / "c.jsonl", b"\n\n")])
    with pytest.raises(UserError, match="c.jsonl has no rows"):
        column_names(unit)


# Fingerprints


def test_fingerprint_is_of_names_and_contents(tmp_path):
    one = write(tmp_path / "one" / "a.jsonl", json_lines(rows(0)))
    same = write(tmp_path / "two" / "a.jsonl", json_lines(rows(0)))
    other_content = write(tmp_path / "three" / "a.jsonl", json_lines(rows(1)))
    other_name = write(tmp_path / "one" / "b.jsonl", json_lines(rows(0)))
    expected = data_fingerprint([one])
    assert data_fingerprint([same]) == expected
    assert data_fingerprint(plan_units([one])) == expected
    assert len({expected, data_fingerprint([other_content]), data_fingerprint([other_name])}) == 3
    assert data_fingerprint([one, other_name]) == data_fingerprint([other_name, one])


def test_fingerprint_of_large_files_is_by_modification_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HASHED_BYTES", 10)
    path = write(tmp_path / "a.jsonl", json_lines(rows(0)))
    os.utime(path, (1, 1))
    before = data_fingerprint([path])
    write(tmp_path / "a.jsonl", json_lines(rows(1)))  # same size
    os.utime(path, (1, 1))
    assert data_fingerprint([path]) == before
    os.utime(path, (2, 2))
    assert data_fingerprint([path]) != before


@pytest.mark.parametrize("known", [{}, {"blob_id": "b"}, {"xet_hash": "x"}, {"last_commit": "c"}, {"ETag": '"e"'}])
def test_large_files_of_which_only_the_size_is_known_are_read(known, monkeypatch):
    """hf:// knows no modification time but other things; some know nothing."""
    monkeypatch.setattr(sources, "HASHED_BYTES", 10)
    fs = fsspec.filesystem("memory")
    about = known

    def info(self, path, **options):
        return {"name": path, "size": 64, "type": "file", "blob_id": None, **about}

    def fingerprint(content: bytes) -> str:
        fs.pipe_file("/test_large/a.jsonl", content)
        with monkeypatch.context() as patch:
            patch.setattr(type(fs), "info", info)
            return data_fingerprint([sources.ReadUnit("jsonl", "memory://test_large/a.jsonl", 0, 0, 0)])

    try:
        first = fingerprint(b"a" * 64)
        assert fingerprint(b"a" * 64) == first
        assert (fingerprint(b"b" * 64) == first) == bool(known)
        if known:
            about = dict.fromkeys(known, "another")
            assert fingerprint(b"a" * 64) != first
    finally:
        fs.rm("/test_large", recursive=True)


def test_import_is_light():
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, alphatoken.sources, alphatoken.encode; print([m for m in {heavy} if m in sys.modules])"
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
