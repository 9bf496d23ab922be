"""Broken, mixed and malicious input: every row comes out or is put aside with a reason; nothing else is raised."""

import datetime
import decimal
import errno
import gzip
import itertools
import json
import os
import random
import tracemalloc
from collections import Counter

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from alphatoken import readers, retries
from alphatoken.config import DataOptions
from alphatoken.encode import Encoder, check_source
from alphatoken.errors import BadRowError, UserError
from alphatoken.model_encoder import make_encoder
from alphatoken.pair_encode import PairEncoder
from alphatoken.plan_data import sequence_encoder
from alphatoken.prompts import PromptReader
from alphatoken.run_folder import RunFolder
from alphatoken.sources import ReadUnit, SourceRow, data_fingerprint, plan_units, read_unit
from pipelines.encode import EncodePlan, encode_row, pair_columns, prompt_columns, row_columns
from pipelines.generate import prompt_request
from pipelines.shards import write_block

FUZZ = settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
GOOD = {"prompt": "What is two plus two?", "completion": " four"}
KINDS = ("rows", "pairs", "prompts")


def stages(template: str | None = tiny.CHATML, **options) -> dict:
    """What encodes rows, pairs and prompts, by kind."""
    tokenizer = tiny.byte_level(template)
    encoder = Encoder(tokenizer, DataOptions(max_length=300, **options), len(tokenizer))
    return {"rows": encoder, "pairs": PairEncoder(encoder), "prompts": PromptReader(encoder, 200)}


STAGES = {template: stages(template) for template in (tiny.CHATML, None)}
COLUMNS = {
    "rows": row_columns(STAGES[tiny.CHATML]["rows"]),
    "pairs": pair_columns(STAGES[tiny.CHATML]["pairs"]),
    "prompts": prompt_columns(STAGES[tiny.CHATML]["prompts"]),
}


def as_table(records: list[dict], kind: str, keep: tuple[str, ...] = ()) -> pa.Table:
    """As the pipeline makes it."""
    schema = EncodePlan("model", False, DataOptions(), keep, kind=kind).arrow_schema
    return pa.Table.from_pylist(records, schema=schema)


def put(path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def lines(*rows: dict) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(*sources: str) -> list[SourceRow]:
    return [row for unit in plan_units(list(sources)) for row in read_unit(unit)]


def encoded(rows: list[SourceRow], kind: str = "rows", keep: tuple[str, ...] = ()) -> pa.Table:
    return as_table([encode_row(row, COLUMNS[kind], keep) for row in rows], kind, keep)


# Files


def test_truncated_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist([GOOD] * 100), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for stop in (3, len(content) // 2, len(content) - 1):
        with pytest.raises(UserError, match="a.parquet is not a Parquet file that can be read"):
            plan_units([put(tmp_path / "a.parquet", content[:stop])])


def test_gzip_that_is_cut_or_none_or_followed_by_rubbish(tmp_path):
    content = gzip.compress(lines(*[GOOD] * 2000), compresslevel=0)
    *good, bad = read(put(tmp_path / "cut.jsonl.gz", content[:-5000]))
    assert len(good) > 100 and "cannot be read from here on" in bad.error
    *good, bad = read(put(tmp_path / "tail.jsonl.gz", content + b"rubbish"))
    assert len(good) == 2000 and "cannot be read from here on" in bad.error
    with pytest.raises(UserError, match="plain.jsonl.gz cannot be read"):
        plan_units([put(tmp_path / "plain.jsonl.gz", lines(GOOD))])


@pytest.mark.parametrize("later", [{"prompt": "no completion"}, {"prompt": "a", "completion": "b", "id": 7}])
def test_files_of_other_columns(tmp_path, later):
    """A file whose first row has another format stops the job by name; a single row is put aside."""
    first = put(tmp_path / "a.jsonl", lines({**GOOD, "id": "x"}, later))
    second = put(tmp_path / "b.jsonl", lines(later))
    usable = "completion" in later
    table = encoded(read(first, second))
    assert [reason is None for reason in table["reason"].to_pylist()] == [True, usable, usable]
    assert table["id"].to_pylist() == ["x", "7", "7"] if usable else ["x", "a.jsonl:1", "b.jsonl:0"]
    if not usable:
        with pytest.raises(UserError, match="b.jsonl: The columns do not form a known format"):
            check_source(plan_units([first, second]), DataOptions(), tiny.byte_level(tiny.CHATML))


def test_parquet_files_of_other_types(tmp_path):
    columns = [["a"], [1], [None], [{"x": [None]}], [[["deep", None]]], [b"bytes"], [decimal.Decimal("1.5")]]
    for number, completion in enumerate(columns):
        table = pa.table({"prompt": pa.array(["a"]), "completion": pa.array(completion), "kept": pa.array(completion)})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    table = encoded(read(str(tmp_path)), keep=("kept",))
    assert [reason is None for reason in table["reason"].to_pylist()] == [True, *[False] * 6]
    assert table["kept: kept"].to_pylist()[:4] == ["a", "1", None, '{"x": [null]}']


def test_parquet_values_that_python_cannot_hold_cost_their_row_only(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1],
                                                    pa.py_buffer(b"a\xffc")])  # fmt: skip
    times = pa.array([0, 0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": broken, "completion": ["x", "y", "z"], "when": times}), tmp_path / "a.parquet")
    found = read(str(tmp_path / "a.parquet"))
    assert [row.position for row in found] == [0, 1, 2]
    assert found[0].data["prompt"] == "a"
    assert found[1].error.startswith("the column prompt cannot be read: 'utf-8' codec")
    assert found[2].error.startswith("the column when cannot be read: ")


def test_data_set_rows_that_cannot_be_decoded_cost_themselves_only(tmp_path, monkeypatch):
    from datasets import Dataset

    class Rows(list):
        def select(self, indices):
            return Rows(self[index] for index in indices)

        def __iter__(self):
            for row in super().__iter__():
                if row == "bad":
                    raise KeyError("decoder")
                yield row

    Dataset.from_list([GOOD]).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(readers, "load_data_set", lambda *_: Rows([GOOD, "bad", "bad", GOOD]))
    found = list(read_unit(ReadUnit("saved", f"{tmp_path}/saved:", 0, 0, 4)))
    assert [(row.position, row.error) for row in found] == [
        (0, None), (1, "the row cannot be read: 'decoder'"), (2, "the row cannot be read: 'decoder'"), (3, None)
    ]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_file_name_that_is_no_text_stops_the_job(tmp_path):
    put(tmp_path / os.fsdecode(b"\xff.jsonl"), lines(GOOD))
    with pytest.raises(UserError, match=r"The file name .*\\xff.jsonl is not valid UTF-8") as error:
        plan_units([str(tmp_path)])
    str(error.value).encode()


# Lines


def test_a_line_of_100_mb_is_neither_held_nor_parsed(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(lines(GOOD))
        file.seek(100 * 2**20, os.SEEK_CUR)  # a hole: NUL bytes
        file.write(b"\n" + lines(GOOD))
    tracemalloc.start()
    try:
        found = read(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(row.position, row.error) for row in found] == [
        (0, None), (1, f"the line is longer than {16 * 2**20} bytes"), (2, None)
    ]  # fmt: skip
    assert peak < 64 * 2**20


def test_invalid_lines_between_good_ones(tmp_path):
    bad = [b'{"a": "\xff\xfe"}', b"\x00", b'{"a": "\x00"}', b"\xff\xfe{\x00", b"NaN", b'"text"', b"{}{}", b"'"]
    content = b"\n".join(itertools.chain.from_iterable((lines(GOOD).strip(), line) for line in bad))
    found = read(put(tmp_path / "a.jsonl", content))
    assert [row.data == GOOD for row in found] == [True, False] * len(bad)
    assert all(row.error for row in found[1::2])


def test_byte_order_marks_line_ends_and_escaped_nul(tmp_path):
    mark = b"\xef\xbb\xbf"
    row = lines({"prompt": "a\0b", "completion": " four", "id": "\0"}).strip()
    found = read(put(tmp_path / "a.jsonl", mark + row + b"\r\n\r\n \t\r\n" + mark + row + b"\r\n"))
    assert [row.position for row in found] == [0, 3]
    assert encoded(found)["reason"].to_pylist() == [None, None]
    assert encoded(found)["id"].to_pylist() == ["\0", "\0"]


def test_a_great_many_empty_lines(tmp_path):
    empty = 100_000
    path = put(tmp_path / "a.jsonl.gz", gzip.compress(b"\n" * empty + lines(GOOD), compresslevel=1))
    (row,) = read(path)
    assert (row.position, row.data) == (empty, GOOD)


@pytest.mark.parametrize("depth", [50, 99, 101, 900, 990, 1100, 100_000])
def test_nesting_up_to_a_limit(tmp_path, depth):
    """The limit does not depend on how deep the stack of the reading process is."""
    deep = b'{"prompt": "a", "completion": " b", "kept": ' + b"[" * depth + b"]" * depth + b"}"
    (row,) = read(put(tmp_path / "a.jsonl", deep + b"\n"))
    assert (row.error is None) == (depth < 100)
    assert row.error is None or "nested too deeply" in row.error
    assert encoded([row], keep=("kept",)).num_rows == 1


# Ids


def test_ids_are_never_file_names(tmp_path):
    ids = ["../../escaped", "/etc/passwd", "a\nb\x1b[31m", "\0", "C:\\x", "same", "same", "x" * 5000, {"a": [1]}, 1e400]
    output = tmp_path / "deep" / "folder" / "out"
    path = put(tmp_path / "in" / "a.jsonl", lines(*({**GOOD, "id": row_id} for row_id in ids), {"id": "../bad"}))
    table = encoded(read(path))
    folder = RunFolder(str(output))
    folder.open({"stage": "encode"})
    counts = write_block(table, str(output))
    assert (counts["rows_in"], counts["rows_out"], counts["rows_quarantined"]) == ([11], [10], [1])
    written = {os.path.relpath(os.path.join(place, name), tmp_path)
               for place, _, names in os.walk(tmp_path) for name in names}  # fmt: skip
    assert written - {"in/a.jsonl"} == {
        f"deep/folder/out/{name}"
        for name in ("run.json", "data/train-000000000000000.parquet", "commits/000000000000000.json",
                     "quarantine/quarantine-000000000000000.parquet")
    }  # fmt: skip
    found = pq.read_table(output / "data" / "train-000000000000000.parquet")
    assert found["id"].to_pylist() == [*ids[:8], '{"a": [1]}', "Infinity"]
    assert len(set(found["row_id"].to_pylist())) == 10


def test_the_id_may_be_in_a_renamed_column():
    renamed = row_columns(stages(columns={"id": "uid"})["rows"])
    record = encode_row(SourceRow(0, "a.jsonl", 0, {**GOOD, "uid": 5}, None), renamed)
    assert (record["id"], record["reason"]) == ("5", None)
    row = SourceRow(0, "a.jsonl", 0, {"prompt": "Hi", "uid": 5}, None)
    request = prompt_request(row, stages(columns={"id": "uid"})["prompts"], "uid")
    assert json.loads(request["carried"])["id"] == "5"


@pytest.mark.parametrize(("kind", "longest"), [("gpt2", 16), ("llama", 300)])
def test_rows_are_cut_at_learned_positions(kind, longest, monkeypatch):
    model = CONFIG_MAPPING[kind](max_position_embeddings=16, vocab_size=300)
    monkeypatch.setattr("alphatoken.model_encoder.load_config", lambda *_: model)
    monkeypatch.setattr("alphatoken.model_encoder.load_tokenizer", lambda *_: tiny.byte_level(tiny.CHATML))
    options, row = DataOptions(max_length=300), {"prompt": "a" * 9, "completion": "b" * 400}
    encoded = make_encoder("m", options).encode(row)
    assert len(encoded.input_ids) == longest and encoded.truncated
    planned = sequence_encoder("m", options, False, False)(row)  # what plan and dry runs count
    assert (planned.lengths, planned.truncated) == ([longest], True)


# Storage of the input


class Buffered(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        if self.fs.errors:
            raise self.fs.errors.pop()
        return self.fs.store[self.path].getvalue()[start:end]


class RemoteFileSystem(MemoryFileSystem):
    """With files as s3fs, gcsfs and others have them."""

    protocol = "remote"
    store: dict = {}
    pseudo_dirs = [""]
    errors: list[Exception] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("remote://", "memory://"))

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            return super()._open(path, mode, **kwargs)
        return Buffered(self, path, mode, block_size=1000, size=self.store[path].size)


@pytest.fixture
def remote(monkeypatch):
    fsspec.register_implementation("remote", RemoteFileSystem, clobber=True)
    monkeypatch.setattr(retries, "wait", lambda attempt: None)
    fs = fsspec.filesystem("remote")
    yield fs
    fs.store.clear()
    fs.errors.clear()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("failures", [0, 3])
def test_remote_files_and_failures_that_pass(remote, name, failures, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BUFFER_BYTES", 1000)
    rows = [{**GOOD, "id": random.Random(number).randbytes(100).hex()} for number in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=250)  # read one by one
    content = {"a.jsonl": lines(*rows), "a.jsonl.gz": gzip.compress(lines(*rows), compresslevel=0)}
    remote.pipe_file(f"/{name}", content.get(name, (tmp_path / "a.parquet").read_bytes()))
    (unit,) = plan_units([f"remote://{name}"])
    iterator = read_unit(unit)
    found = [next(iterator)]
    remote.errors.extend(ConnectionResetError("reset") for _ in range(failures))
    found += iterator
    assert [row.data for row in found] == rows and [row.position for row in found] == list(range(1000))
    assert not remote.errors
    expected = data_fingerprint([unit])
    remote.errors.extend(ConnectionResetError("reset") for _ in range(failures))
    assert data_fingerprint([unit]) == expected


def test_a_remote_that_stays_away_is_no_damaged_file(remote):
    remote.pipe_file("/a.jsonl", lines(*[GOOD] * 50))
    (unit,) = plan_units(["remote://a.jsonl"])
    remote.errors.extend(TimeoutError("too slow") for _ in range(20))
    with pytest.raises(UserError, match=r"a.jsonl cannot be read \(too slow\).*it resumes"):
        list(read_unit(unit))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize(
    "error", [PermissionError("token expired"), FileNotFoundError("a"), OSError(errno.EACCES, "denied")], ids=repr
)
def test_a_remote_that_refuses_midway_ends_the_run_and_no_row_is_lost(remote, name, error, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BUFFER_BYTES", 1000)
    rows = [{**GOOD, "id": random.Random(number).randbytes(100).hex()} for number in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=250)
    content = {"a.jsonl": lines(*rows), "a.jsonl.gz": gzip.compress(lines(*rows), compresslevel=0)}
    remote.pipe_file(f"/{name}", content.get(name, (tmp_path / "a.parquet").read_bytes()))
    (unit,) = plan_units([f"remote://{name}"])
    iterator = read_unit(unit)
    found = [next(iterator)]
    remote.errors.append(error)
    with pytest.raises(UserError, match=rf"{name} cannot be read \(.*\).*it resumes"):
        found.extend(iterator)
    assert not any(row.error for row in found)


# Rows


WRONG = [None, True, 7, -1.5, float("nan"), "", " ", "text", [], {}, [[]], [None], [{}], {"a": None}, ["a", 1],
         b"bytes", [{"role": None, "content": None}], [{"role": "user", "content": 7}],
         [{"role": "assistant", "content": "x"}], {"role": "user", "content": "x"}, [1, None],
         [10**30], [True, False], [1.0], (1, 2), 10**400,
         decimal.Decimal(1), datetime.datetime(2024, 1, 1), "\ud800", [{"role": "\udfff", "content": "\ud800"}],
         [{"role": "user", "content": "x", "reasoning_content": {"a": 1}, "tool_calls": 5}]]  # fmt: skip
NAMES = ["messages", "prompt", "completion", "instruction", "input", "output", "response", "input_ids", "response_mask",
         "labels", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids", "answer", "tools",
         "id"]  # fmt: skip


def attempt(stage, row: dict) -> None:
    """Encodes a row; nothing but a BadRowError, or a UserError, may come out. Their words must be printable."""
    try:
        (stage.read if isinstance(stage, PromptReader) else stage.encode)(row)
    except (BadRowError, UserError) as error:
        assert str(error)


@pytest.mark.parametrize("columns", [
    ("messages",), ("prompt", "completion"), ("instruction", "output"), ("instruction", "input", "response"),
    ("input_ids", "labels"), ("input_ids", "response_mask"), ("prompt", "chosen", "rejected"), ("chosen", "rejected"),
    ("prompt_ids", "chosen_ids", "rejected_ids"), ("messages", "chosen", "rejected"), ("prompt", "answer"),
])  # fmt: skip
def test_wrong_types_everywhere(columns):
    for template, kind in itertools.product(STAGES, KINDS):
        for value in WRONG:
            attempt(STAGES[template][kind], dict.fromkeys(columns, value))
            for name in columns:
                attempt(STAGES[template][kind], {**dict.fromkeys(columns, "some text"), name: value})


def test_truth_values_are_no_token_ids():
    for name in ("input_ids", "labels"):
        with pytest.raises(BadRowError, match=f"{name} has entries that are not whole numbers"):
            STAGES[None]["rows"].encode({"input_ids": [0, 1], "labels": [-100, 1]} | {name: [False, True]})


def test_ids_without_text_in_a_pair():
    with pytest.raises(BadRowError, match="chosen is neither text nor messages"):
        STAGES[None]["pairs"].encode({"prompt_ids": [5], "chosen_ids": None, "rejected_ids": [6]})


def nested(leaves, names):
    """The leaves, lists and objects of them, and lists of those."""
    inner = leaves | st.lists(leaves, max_size=3) | st.dictionaries(names, leaves, max_size=2)
    return inner | st.lists(inner, max_size=3)


TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=12) | st.sampled_from(
    ["Hello there", "<|im_end|>", "<think>x</think>", "\ue0f00\ue0f1", "\ue0f41\ue0f5", "\n\nAssistant: yes", "</s>"]
)
LEAVES = st.none() | st.booleans() | st.integers(-200, 700) | st.floats() | TEXT | st.binary(max_size=4)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "system", "tool"]) | LEAVES, "content": TEXT | LEAVES,
                  "name": LEAVES, "tool_calls": LEAVES}  # fmt: skip
)
VALUE = (
    TEXT | st.lists(MESSAGE, max_size=3) | MESSAGE | st.lists(st.integers(-100, 500) | st.booleans(), max_size=6)
    | nested(LEAVES, TEXT)
)  # fmt: skip
ROW = st.dictionaries(st.sampled_from(NAMES) | TEXT, VALUE, min_size=1, max_size=5)


@FUZZ
@given(row=ROW, policy=st.sampled_from(["literal", "control", "quarantine"]))
def test_any_row_is_encoded_or_refused(row, policy):
    for template, kind in itertools.product(STAGES, KINDS):
        stage = STAGES[template][kind]
        encoder = getattr(stage, "encoder", stage)
        encoder.options = DataOptions(max_length=300, special_tokens_in_text=policy)
        attempt(stage, row)


JSON_VALUE = nested(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    st.sampled_from(NAMES),
)
JSON_ROW = st.dictionaries(st.sampled_from(NAMES), JSON_VALUE | st.lists(MESSAGE.map(repr), max_size=2), max_size=4)
LINE = (
    JSON_ROW.map(json.dumps).map(str.encode)
    | st.sampled_from([lines(GOOD).strip(), b'{"chosen": "Hi: yes", "rejected": "Hi: no", "id": [null]}'])
    | st.binary(max_size=20)
    | st.builds(lambda row, at, new: row[:at] + new + row[at:], JSON_ROW.map(json.dumps).map(str.encode),
                st.integers(0, 60), st.binary(max_size=3))
    | st.sampled_from([b"", b" ", b"\xef\xbb\xbf", b"\0", b"\x0c", b"null", b"{}", b"[]", b"\xed\xa0\x80"])
)  # fmt: skip


@FUZZ
@given(content=st.lists(LINE, max_size=6), end=st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"]))
def test_any_bytes_become_rows_that_add_up(content, end):
    content = end.join(content)
    fsspec.filesystem("memory").pipe_file("/hostile.jsonl", content)
    rows = list(read_unit(ReadUnit("jsonl", "memory://hostile.jsonl", 0, 0, 0)))
    wanted = [line.removeprefix(b"\xef\xbb\xbf").strip() for line in content.split(b"\n")]
    assert [row.position for row in rows] == [position for position, line in enumerate(wanted) if line]
    for kind in KINDS:
        table = encoded(rows, kind, keep=("id", "messages"))
        assert table.num_rows == len(rows)
        total = Counter(reason is None for reason in table["reason"].to_pylist())
        assert total[True] + total[False] == len(rows)
