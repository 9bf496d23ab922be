"""Batches and their budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphatoken.batching import make_batch, plan_batches


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(16, 512))
def test_every_row_is_in_one_batch_within_the_budget(lengths, budget):
    batches = list(plan_batches(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget


def test_alignment():
    batch = make_batch([[5, 6, 7, 8], [9, 4]], [[False, False, True, True], [False, True]], [70, 71])
    rows, positions = batch.predicting
    assert rows.tolist() == [0, 0, 1] and positions.tolist() == [1, 2, 0]  # label index - 1
    assert batch.targets.tolist() == [7, 8, 4]
    assert [part.tolist() for part in batch.split(torch.tensor([1.0, 2.0, 3.0]))] == [[1.0, 2.0], [3.0]]


def test_lengths_that_differ_are_an_error():
    with pytest.raises(ValueError, match="row 1"):
        make_batch([[1, 2], [1, 2]], [[False, True], [True]])
