import numpy as np
import pytest

from alphatoken.batching import split_evenly
from alphatoken.schedule import Schedule, Window
from pipelines.train_data import FILLER, EpochBatches


def schedule(**changes) -> Schedule:
    settings = {
        "num_rows": 23, "rows_per_forward": 4, "accumulation": 2, "epochs": 2.5, "max_steps": None, "seed": 3,
        "plain_steps": 2, "refresh_every": 2,
    }  # fmt: skip
    return Schedule(**(settings | changes))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("plain_steps", [0, 1, 4])
@pytest.mark.parametrize("refresh_every", [1, 3, 100])
def test_windows_have_the_rows_that_the_trainer_reads(workers, plain_steps, refresh_every):
    found = schedule(plain_steps=plain_steps, refresh_every=refresh_every)
    assert (found.steps_per_epoch, found.total_steps) == (3, 8)
    read: dict[int, set[int]] = {}
    for rank in range(workers):
        batches = EpochBatches(23, 4 // workers, rank, workers, seed=3)
        step = 0
        for epoch in range(3):
            batches.set_epoch(epoch)
            micro = list(batches)
            for first in range(0, len(micro), 2):
                rows = [row for batch in micro[first : first + 2] for row in batch if row != FILLER]
                read.setdefault(step, set()).update(rows)
                step += 1
    covered = []
    for window in found.windows:
        rows, steps = found.rows_of(window)
        expected = set().union(*(read[step] for step in range(window.start, window.stop)))
        assert set(rows.tolist()) == expected and len(rows) == len(expected)
        for row, step in zip(rows.tolist(), steps.tolist(), strict=True):
            assert step == min(s for s in range(window.start, window.stop) if row in read[s])
        covered += range(window.start, window.stop)
        assert all(found.window_at(step) == window for step in range(window.start, window.stop))
    assert covered == list(range(plain_steps, 8))
    assert all(found.window_at(step) is None for step in range(plain_steps))


def test_weights_of_a_window():
    assert schedule().windows[:2] == [Window(2, 4, 2), Window(4, 6, 4)]
    assert schedule(overlap=True).windows[:2] == [Window(2, 4, 1), Window(4, 6, 2)]
    assert schedule(overlap=True, plain_steps=0).windows[:2] == [Window(0, 2, 0), Window(2, 4, 0)]
    assert schedule(refresh_every=100).windows == [Window(2, 8, 2)]
    assert schedule(plain_steps=8).windows == []


@pytest.mark.parametrize("plain_steps", [0, 1, 3, 4, 9])
def test_pairs_that_are_generated_are_valued_once_the_plain_steps_are_over(plain_steps):
    """Every step has a window, for its pairs, and those of the plain steps end with them."""
    found = schedule(generates=True, plain_steps=plain_steps, refresh_every=3)
    steps = [(step, found.is_plain(window)) for window in found.windows for step in range(window.start, window.stop)]
    assert steps == [(step, step < plain_steps) for step in range(8)]
    assert all(found.window_at(step).start <= step < found.window_at(step).stop for step in range(8))
    assert all(window.stop - window.start <= 3 for window in found.windows)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_split_evenly(parts):
    lengths = np.random.default_rng(0).integers(1, 50, size=40)
    found = split_evenly(lengths, parts)
    assert np.concatenate(found).tolist() == list(range(40)) and len(found) == parts
    sums = [lengths[part].sum() for part in found]
    assert max(sums) - min(sums) <= 2 * 50
    assert [part.tolist() for part in split_evenly(np.array([5]), 3)].count([0]) == 1
