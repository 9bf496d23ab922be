"""Suspect tokens and rows (alphatoken/suspects.py)."""

import numpy as np
import pytest

from alphatoken.suspects import (
    FEWEST_TOKENS,
    Bounds,
    TokenLosses,
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


@pytest.mark.parametrize("seed", range(5))
def test_bounds_equal_a_loop_over_rows_and_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def draw(rows: int) -> TokenLosses:
        lengths = rng.integers(1, 40, rows)
        return TokenLosses(rng.gamma(2.0, 1.0, lengths.sum()), rng.integers(0, 6, lengths.sum()), lengths)

    validation, found = TokenLosses.joined([draw(10), draw(5)]), draw(20)
    values = rng.normal(size=len(found.losses))
    bounds = Bounds.of(validation)
    means = [part.mean() for part in np.split(validation.losses, validation.offsets[1:-1])]
    assert len(means) == 15 and bounds.row == pytest.approx(np.mean(means) + 3 * np.std(means, ddof=1))
    expected = []
    for start, stop in zip(found.offsets, found.offsets[1:], strict=False):
        bad_row = found.losses[start:stop].mean() > bounds.row
        for i in range(start, stop):
            mine = validation.losses[validation.classes == found.classes[i]]
            surprising = len(mine) >= FEWEST_TOKENS and found.losses[i] > np.quantile(mine, 0.9)
            expected.append((not bad_row and not surprising, not bad_row and not (surprising and values[i] < 0)))
    assert bounds.keep(found).tolist() == [either for either, _ in expected]
    assert bounds.keep(found, values).tolist() == [both for _, both in expected]
    assert 0 < bounds.keep(found).sum() < bounds.keep(found, values).sum() < len(values)
