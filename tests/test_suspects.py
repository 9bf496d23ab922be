"""Suspect tokens and rows (alphatoken/suspects.py)."""

import numpy as np
import pytest

from alphatoken.suspects import (
    FEWEST_TOKENS,
    loss_bounds,
    row_loss_bound,
    row_means,
    surprising_tokens,
    suspect_rows,
    suspect_tokens,
)


def test_bounds_are_quantiles_of_each_class() -> None:
    losses = np.concatenate([np.linspace(0, 1, 101), np.linspace(0, 10, 101)])
    classes = np.repeat([0, 2], 101)
    assert loss_bounds(losses, classes, 4, 0.9).tolist() == pytest.approx([0.9, np.inf, 9.0, np.inf])


def test_a_class_with_few_validation_tokens_is_never_surprising() -> None:
    few = np.zeros(FEWEST_TOKENS - 1)
    bounds = loss_bounds(few, few.astype(int), 1)
    assert not surprising_tokens(np.array([1e9]), np.array([0]), bounds).any()


def test_suspects_are_surprising_and_harmful() -> None:
    losses, values = np.array([5.0, 5.0, 0.5, 1.0]), np.array([-1.0, 1.0, -1.0, -1.0])
    found = suspect_tokens(losses, values, np.zeros(4, int), np.array([1.0]))
    assert found.tolist() == [True, False, False, False]  # a loss at the bound is not above it


def test_rows_are_judged_by_mean_loss() -> None:
    validation, offsets = np.array([1.0, 1.0, 2.0, 2.0, 3.0, 3.0]), np.array([0, 2, 4, 6])
    assert row_means(validation, offsets).tolist() == [1.0, 2.0, 3.0]
    assert row_loss_bound(validation, offsets, width=2.0) == pytest.approx(4.0)
    assert suspect_rows(np.array([3.9, 4.0, 4.2]), np.array([0, 1, 2, 3]), 4.0).tolist() == [False, False, True]
    assert row_loss_bound(validation[:2], offsets[:2]) == np.inf
