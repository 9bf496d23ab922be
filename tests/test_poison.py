"""Rows that kill their process are found by the notes of the dead, without Ray: attempts are forked processes."""

import os
import random
import signal

import pyarrow as pa
import pytest

from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.run_folder import RunFolder
from pipelines.poison import DEATHS_AFTER, DEATHS_ALONE, DIED, Attempt

BATCH_TOKENS = 40


def block_of(random_: random.Random, rows: int, first: int = 0) -> pa.Table:
    lists = [[0] * random_.randint(1, 20) for _ in range(rows)]
    return pa.table(
        {"row_id": pa.array(range(first, first + rows)), "input_ids": pa.array(lists, pa.list_(pa.int32()))}
    )


def attempt(folder, block: pa.Table, compute, end: bool = True, batch_tokens: int = BATCH_TOKENS):
    """One attempt in a process of its own: its result, or None if it died. UserError as it raises it."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            this = Attempt(str(folder), block, batch_tokens)
            table, failures, _ = this.score(compute)
            if end:
                this.end()
            found = {table["row_id"][i].as_py(): failures.get(i) for i in range(table.num_rows)}
            os.write(write, repr(found).encode())
        except UserError as error:
            os.write(write, repr(str(error)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    found = eval(said) if said else None
    if isinstance(found, str):
        raise UserError(found)
    return found


def until_done(folder, block: pa.Table, compute, most: int = 60, **more):
    """(result, deaths)"""
    for deaths in range(most):
        found = attempt(folder, block, compute, **more)
        if found is not None:
            return found, deaths
    raise AssertionError(f"not done after {most} deaths")


def killing(poison: set[int], computed: list | None = None):
    """A scorer that dies on some rows."""

    def compute(table: pa.Table):
        if poison & set(table["row_id"].to_pylist()):
            os.kill(os.getpid(), signal.SIGKILL)
        return table.append_column("value", pa.array([1.0] * table.num_rows)), {}, table.num_rows

    return compute


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_kill_are_put_aside_and_no_others(tmp_path, seed):
    random_ = random.Random(seed)
    block = block_of(random_, random_.randint(1, 30), first=100)
    poison = set(random_.sample(block["row_id"].to_pylist(), min(block.num_rows, random_.randint(1, 3))))
    found, deaths = until_done(tmp_path, block, killing(poison))
    assert {row for row, reason in found.items() if reason} == poison
    assert sorted(found) == block["row_id"].to_pylist()
    assert all(found[row].startswith(DIED) for row in poison)
    assert deaths <= 1 + len(poison) * (1 + DEATHS_ALONE)
    assert not storage.list_names(f"{tmp_path}/attempts")


def test_a_block_whose_rows_all_kill_has_the_columns_of_others(tmp_path):
    block = block_of(random.Random(0), 2)
    this = Attempt(str(tmp_path), block, BATCH_TOKENS)
    this.deaths = [{"doing": "row", "row_ids": [[row, row]]} for row in (0, 1)] * DEATHS_ALONE
    table, failures, computed = this.score(killing({0, 1}))
    assert table["row_id"].to_pylist() == [0, 1] and "value" in table.column_names
    assert all(failures[row].startswith(DIED) for row in (0, 1)) and not computed


def test_one_row_costs_four_deaths_in_a_block_of_many_batches(tmp_path):
    block = block_of(random.Random(0), 200)
    found, deaths = until_done(tmp_path, block, killing({77}))
    assert deaths == 2 + DEATHS_ALONE and found[77] == f"{DIED}, 4 times"


@pytest.mark.parametrize("seed", range(3))
def test_processes_that_are_killed_blame_no_row(tmp_path, seed):
    """Blocks that are each killed twice at a random group, as by lost machines."""
    random_ = random.Random(seed)
    for first in range(0, 500, 100):
        block, fatal = block_of(random_, 20, first), [random_.randint(0, 4) for _ in range(2)]
        for deadly in fatal:

            def compute(table, left=[deadly]):  # noqa: B006 - the counter of this process
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return table, {}, 0

            attempt(tmp_path, block, compute, end=False)
        found, _ = until_done(tmp_path, block, killing(set()))
        assert sorted(found) == block["row_id"].to_pylist() and not any(found.values())


def test_other_reasons_stay_with_their_rows(tmp_path):
    def compute(table: pa.Table):
        ids = table["row_id"].to_pylist()
        if 3 in ids:
            os.kill(os.getpid(), signal.SIGKILL)
        return table, {ids.index(9): "nine"} if 9 in ids else {}, 0

    found, _ = until_done(tmp_path, block_of(random.Random(1), 12), compute)
    assert {row: reason for row, reason in found.items() if reason} == {3: f"{DIED}, {found[3].split()[-2]} times",
                                                                        9: "nine"}  # fmt: skip


def test_where_every_row_kills_it_is_not_the_rows(tmp_path):
    block = block_of(random.Random(2), 20)
    with pytest.raises(UserError, match="wrong set-up"):
        until_done(tmp_path, block, killing(set(range(20))))


def test_where_every_block_kills_it_is_not_the_rows(tmp_path):
    """Blocks of one row each; with another row scored before, they are put aside."""
    folder = RunFolder(str(tmp_path))
    with pytest.raises(UserError, match="wrong set-up"):
        for first in range(10):
            block = block_of(random.Random(0), 1, first)
            found, _ = until_done(tmp_path, block, killing({first}))
            folder.write_shard(None, None, {"first_row_id": first, "row_ids": [[first, first]],
                                            "counts": {"rows_out": 0}, "reasons": {found[first]: 1}})  # fmt: skip
    assert first == 3
    record = {"first_row_id": 50, "row_ids": [[50, 50]], "counts": {"rows_out": 1}, "reasons": {}}
    folder.write_shard(None, None, record)
    assert until_done(tmp_path, block, killing({3}))[0][3].startswith(DIED)


def test_deaths_after_the_rows_blame_no_row(tmp_path):
    """As where the shard does not fit the memory."""

    class Dying(Attempt):
        def score(self, compute):
            super().score(compute)
            os.kill(os.getpid(), signal.SIGKILL)

    block = block_of(random.Random(3), 10)
    for _ in range(1 + DEATHS_AFTER):
        child = os.fork()
        if not child:
            try:
                Dying(str(tmp_path), block, BATCH_TOKENS).score(killing(set()))
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(UserError, match="while it wrote the shard of row 0"):
        Attempt(str(tmp_path), block, BATCH_TOKENS).score(killing(set()))


def test_a_resumed_run_with_other_blocks_uses_what_is_known(tmp_path):
    rows = block_of(random.Random(4), 40)
    assert attempt(tmp_path, rows.slice(0, 20), killing({5})) is None
    assert attempt(tmp_path, rows.slice(0, 20), killing({5})) is None
    found, deaths = until_done(tmp_path, rows, killing({5, 33}))
    assert {row for row, reason in found.items() if reason} == {5, 33} and deaths <= 5


def test_a_block_that_nothing_happens_to_is_computed_in_one_call(tmp_path):
    calls = []
    block = block_of(random.Random(5), 30)
    this = Attempt(str(tmp_path), block, BATCH_TOKENS)
    table, failures, computed = this.score(lambda table: (calls.append(table.num_rows) or table, {}, 7))
    assert calls == [30] and table.equals(block) and not failures and computed == 7
    assert storage.list_names(f"{tmp_path}/attempts") == ["000000000000000.json"]
    this.end()
    assert not storage.list_names(f"{tmp_path}/attempts")


def test_a_block_without_rows_is_nothing_to_note(tmp_path):
    this = Attempt(str(tmp_path), block_of(random.Random(0), 0), BATCH_TOKENS)
    assert list(this.parts()) == [] and not this.deadly
    this.end()
    assert not storage.list_names(str(tmp_path))
