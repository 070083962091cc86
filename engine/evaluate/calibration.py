"""Calibration of probabilities: reliability curve, expected calibration error, Brier score, slope and intercept.

ECE = sum over 15 bins of equal width of |bin's frequency - bin's mean probability| x bin's fraction of the rows (Guo et
al., 2017), here for the positive class. Brier score = mean (p - y)^2. Slope b and intercept a are those of
logit P(y = 1) = a + b z with log-odds z (Cox, 1958): b < 1 means that probabilities are too extreme. Calibration in the
large is a for b = 1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from .checks import Array, labels_and_probabilities, labels_and_scores, some

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Bins with equal numbers of rows (except for ties), by increasing probability; arrays of one length."""

    probability: Array
    """Mean probability of the bin."""
    frequency: Array
    """Fraction of positives."""
    low: Array
    high: Array
    """Wilson's 95 % interval of the frequency."""
    rows: NDArray[np.int64]


def reliability(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> Reliability:
    """The reliability curve of rows (n,) in bins of equal counts; equal probabilities are in one bin."""
    truth, p = labels_and_probabilities(labels, probabilities)
    edges = np.unique(np.quantile(some(p), np.linspace(0, 1, bins + 1)))
    number = np.searchsorted(edges[1:-1], p, side="right")
    rows = np.bincount(number)
    used = np.flatnonzero(rows)
    positives = np.bincount(number, truth, minlength=len(rows))[used]
    intervals = [
        binomtest(int(k), int(n)).proportion_ci(method="wilson") for k, n in zip(positives, rows[used], strict=True)
    ]
    return Reliability(
        np.bincount(number, p, minlength=len(rows))[used] / rows[used],
        positives / rows[used],
        np.array([i.low for i in intervals]),
        np.array([i.high for i in intervals]),
        rows[used],
    )


class Binned:
    """Rows (n,) in the bins of the ECE, for weighted sums; fastest if sorted by probability."""

    def __init__(self, truth: Array, probabilities: Array) -> None:
        self._left = truth - probabilities
        bins = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)  # the last one includes 1
        self._starts = np.flatnonzero(np.append(True, bins[1:] != bins[:-1]))
        self._bins = np.eye(BINS)[bins[self._starts]]

    def expected_error(self, weights: Array) -> Array:
        """ECE (b,) of the rows for weights (b, n)."""
        runs = np.add.reduceat(weights * self._left, self._starts, axis=1)
        return np.abs(runs @ self._bins).sum(1) / weights.sum(1)


def slope_and_intercept(labels: ArrayLike, log_odds: ArrayLike) -> tuple[float, float] | None:
    """Cox's slope and intercept; None if the scores separate the classes or are infinite."""
    truth, [z] = labels_and_scores(labels, log_odds)
    if not np.isfinite(z).all() or _separated(truth, z):
        return None
    # Standardised, so that the optimiser sees numbers of order one at any scale of the network.
    middle, spread = float(z.mean()), float(z.std())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence is checked by the gradient below
        model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        model.fit(((z - middle) / spread)[:, None], truth)
    slope = float(np.ravel(model.coef_)[0]) / spread
    intercept = float(np.ravel(model.intercept_)[0]) - slope * middle
    left = expit(intercept + slope * z) - truth
    return (slope, intercept) if abs(left.sum()) < 1e-6 * len(z) else None


def in_the_large(labels: ArrayLike, log_odds: ArrayLike) -> float | None:
    """The shift of log-odds that equates mean probability and frequency; None with one class or infinite odds."""
    truth, [z] = labels_and_scores(labels, log_odds)
    if not np.isfinite(z).all() or truth.all() or not truth.any():
        return None
    reach = float(np.abs(z).max()) + float(np.log(len(z))) + 1
    frequency = truth.mean()
    return float(brentq(lambda shift: float(np.mean(expit(z + shift)) - frequency), -reach, reach))  # pyright: ignore


def _separated(truth: NDArray[np.bool_], z: Array) -> bool:
    """Whether a threshold separates the classes, or there is one class or value: the fit has no finite maximum."""
    if truth.all() or not truth.any() or z.min() == z.max():
        return True
    return bool(z[truth].min() >= z[~truth].max() or z[truth].max() <= z[~truth].min())
