"""Suspect tokens and rows (alphatoken/suspects.py)."""

import math

import numpy as np
import pytest

from alphatoken import suspects
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


def slow_bounds(known: list[tuple[int, float]], judged: list[tuple[int, float]], classes: int) -> list[float]:
    """The definition, token by token, from (class, loss) pairs."""
    found = []
    for number in range(classes):
        mine = [loss for kind, loss in known if kind == number]
        others = [loss for kind, loss in judged if kind == number]
        bound = math.inf
        if len(mine) >= suspects.FEWEST_TOKENS and len(others) >= suspects.FEWEST_TOKENS:
            for quantile in reversed(suspects.QUANTILES):
                limit = float(np.quantile(mine, quantile))
                above = 1 + sum(loss > limit for loss in mine)
                expected = (above + math.sqrt(above)) / len(mine)
                share = sum(loss > limit for loss in others) / len(others)
                if share * (1 - suspects.LEAST_EXCESS) >= expected:
                    bound = limit
        found.append(bound)
    return found


def draw(rng: np.random.Generator, rows: int, noise: float = 0.0) -> TokenLosses:
    """Losses of random rows; a share of the tokens of class 1 has much larger ones."""
    lengths = rng.integers(1, 40, rows)
    losses, classes = rng.gamma(2.0, 1.0, lengths.sum()), rng.integers(0, 6, lengths.sum())
    noisy = (classes == 1) & (rng.random(len(losses)) < noise)
    return TokenLosses(losses + 8 * noisy, classes, lengths)


def pairs(found: TokenLosses) -> list[tuple[int, float]]:
    return list(zip(found.classes.tolist(), found.losses.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_bounds_equal_their_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known, judged = draw(rng, 40), draw(rng, 60, noise=0.3)
    bounds = loss_bounds(known, judged)
    assert bounds.tolist() == pytest.approx(slow_bounds(pairs(known), pairs(judged), 6))
    assert np.isfinite(bounds[1])  # where there is noise
    losses, classes = np.append(judged.losses, [np.nan, np.inf]), np.append(judged.classes, [1, 1])
    with_nan = TokenLosses(losses, classes, judged.lengths)
    assert loss_bounds(known, with_nan)[1] == bounds[1]


def test_data_like_the_validation_rows_stay_whole() -> None:
    """However heavy their tail: over 200 draws a bound appears for fewer than one class in a hundred."""
    rng = np.random.default_rng(0)
    found = np.array([loss_bounds(draw(rng, 24), draw(rng, 48)) for _ in range(200)])
    assert np.isfinite(found).mean() < 0.01


def test_a_class_with_few_tokens_is_never_surprising() -> None:
    many, few = (TokenLosses(np.ones(n), np.zeros(n, int), np.array([n])) for n in (FEWEST_TOKENS, FEWEST_TOKENS - 1))
    for known, judged in ((few, many), (many, few)):
        bounds = loss_bounds(known, TokenLosses(1e9 * judged.losses, judged.classes, judged.lengths))
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
def test_what_is_kept_equals_a_loop_over_rows_and_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    validation, found = TokenLosses.joined([draw(rng, 20), draw(rng, 20)]), draw(rng, 60, noise=0.3)
    values = rng.normal(size=len(found.losses))
    bounds = Bounds.of(validation, found)
    means = [part.mean() for part in np.split(validation.losses, validation.offsets[1:-1])]
    assert len(means) == 40 and bounds.row == pytest.approx(np.mean(means) + 3 * np.std(means, ddof=1))
    limits, expected = slow_bounds(pairs(validation), pairs(found), 6), []
    for start, stop in zip(found.offsets, found.offsets[1:], strict=False):
        bad_row = found.losses[start:stop].mean() > bounds.row
        for i in range(start, stop):
            surprising = found.losses[i] > limits[found.classes[i]]
            expected.append((not bad_row and not surprising, not bad_row and not (surprising and values[i] < 0)))
    assert bounds.keep(found).tolist() == [either for either, _ in expected]
    assert bounds.keep(found, values).tolist() == [both for _, both in expected]
    assert 0 < bounds.keep(found).sum() < bounds.keep(found, values).sum() < len(values)
