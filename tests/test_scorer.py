"""The scoring actor with two blocks in its hands."""

import threading

import pyarrow as pa
import pytest

from alphatoken import storage
from alphatoken.config import ScoreConfig
from pipelines import scorer as module
from pipelines.poison import Attempt
from pipelines.scorer import Scorer
from pipelines.turns import Turns

LONG = 30.0  # seconds until a wait is given up


def block_of(first: int) -> pa.Table:
    return pa.table({
        "row_id": pa.array([first, first + 1], pa.int64()),
        "input_ids": pa.array([[1, 2], [3]], pa.list_(pa.int32())),
        "reason": pa.array([None, None], pa.string()),
    })  # fmt: skip


class Followed(Scorer):
    """Says what it does when, without a model."""

    def __init__(self, output: str) -> None:
        self.config = ScoreConfig(model="m", data=["d"], output=output, estimator="loss")
        self.output, self.turns, self.said = output, Turns(), []
        self.writing, self.second = threading.Event(), threading.Event()

    def _score(self, table: pa.Table) -> tuple[pa.Table, dict[int, str], int]:
        self.said.append(f"compute {table['row_id'][0]}")
        if table["row_id"][0].as_py() == 10:
            self.second.set()
        return table, {}, 3


@pytest.fixture
def actor(tmp_path, monkeypatch):
    """Writing the first block takes until the second is computed, or until that is given up."""
    actor = Followed(str(tmp_path))

    def write(block: pa.Table, output: str, cost: dict) -> dict:
        first = min(block["row_id"].to_pylist())
        if first == 0:
            actor.writing.set()
            actor.second.wait(actor.patience)
        actor.said.append(f"written {first}")
        return {name: [value] for name, value in cost.items()}

    monkeypatch.setattr(module, "write_block", write)
    return actor


def both(actor: Followed) -> list[dict]:
    """The second block comes when the first one is being written."""
    found: list[dict] = []
    first = threading.Thread(target=lambda: found.append(actor(block_of(0))))
    first.start()
    assert actor.writing.wait(LONG)
    found.append(actor(block_of(10)))
    first.join()
    return found


def test_a_block_is_computed_while_another_is_written(actor):
    actor.patience = LONG
    costs = both(actor)
    assert actor.said.index("compute 10") < actor.said.index("written 0")
    assert not storage.list_names(f"{actor.output}/attempts")
    assert all(cost["computed_positions"] == [3] and cost["idle_seconds"][0] >= 0 for cost in costs)


def test_a_block_on_which_a_process_died_is_written_before_the_next_is_computed(actor):
    Attempt(actor.output, block_of(0), actor.config.batch_tokens).announce()  # and dies
    actor.patience = 0.2  # for nothing
    both(actor)
    assert actor.said.index("written 0") < actor.said.index("compute 10")


def test_a_block_is_noted_before_its_turn(actor, monkeypatch):
    actor.patience = LONG
    noted = threading.Event()
    monkeypatch.setattr(Attempt, "announce", lambda self, announce=Attempt.announce: (announce(self), noted.set()))
    with actor.turns.turn():
        waiting = threading.Thread(target=lambda: actor(block_of(10)))
        waiting.start()
        assert noted.wait(LONG)
        assert storage.list_names(f"{actor.output}/attempts") and not actor.said
    waiting.join()
    assert actor.said[0] == "compute 10"


def test_idle_time_is_what_lies_between_turns(monkeypatch):
    clock = iter([0.0, 3.0, 5.0, 9.0, 9.0])  # made, turn, its end, turn, its end
    monkeypatch.setattr("pipelines.turns.time.monotonic", lambda: next(clock))
    turns = Turns()
    for expected in (3.0, 4.0):
        with turns.turn() as idle:
            assert idle == expected
