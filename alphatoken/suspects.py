"""Suspect tokens and rows: what validation rows, which are good, do not look like. In numpy.

    a token is surprising   its loss is above the q-quantile of the validation tokens of its class
    a token is suspect      it is surprising, and its value is below zero: training on it raises the validation loss
    a row is suspect        its mean loss is above m + w s; m, s: mean and standard deviation of validation rows' means

Neither sign is enough alone: a surprising token may be what is to be learned, and many good tokens have a negative
value at some checkpoint. No share of the data has to be dropped, so clean data stay nearly whole. Bounds and values
belong to one checkpoint.

N response tokens, flat; R rows, row r at offsets[r]:offsets[r + 1]; C token classes.
"""

import numpy as np

FEWEST_TOKENS = 30  # validation tokens of a class below which its tokens are never surprising
QUANTILE = 0.9
ROW_WIDTH = 3.0


def loss_bounds(losses: np.ndarray, classes: np.ndarray, num_classes: int, quantile: float = QUANTILE) -> np.ndarray:
    """float64 (C,): the quantile of validation losses by token class; infinity where too few tokens are known."""
    bounds = np.full(num_classes, np.inf)
    for number in range(num_classes):
        known = losses[classes == number]
        if len(known) >= FEWEST_TOKENS:
            bounds[number] = np.quantile(known, quantile)
    return bounds


def row_loss_bound(losses: np.ndarray, offsets: np.ndarray, width: float = ROW_WIDTH) -> float:
    """m + w s of the validation rows; infinity from fewer than two rows."""
    means = row_means(losses, offsets)
    return float(means.mean() + width * means.std(ddof=1)) if len(means) > 1 else float("inf")


def surprising_tokens(losses: np.ndarray, classes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """True (N,) where a loss is above the bound of its class."""
    return losses > bounds[classes]


def suspect_tokens(losses: np.ndarray, values: np.ndarray, classes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """True (N,): surprising and of negative value."""
    return surprising_tokens(losses, classes, bounds) & (values < 0)


def suspect_rows(losses: np.ndarray, offsets: np.ndarray, bound: float) -> np.ndarray:
    """True (R,) where a row's mean loss is above the bound."""
    return row_means(losses, offsets) > bound


def row_means(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """float64 (R,); every row has a response token."""
    return np.add.reduceat(values.astype(np.float64), offsets[:-1]) / np.diff(offsets)
