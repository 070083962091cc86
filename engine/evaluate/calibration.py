"""Whether probabilities are frequencies: reliability curve, expected calibration error, Brier score, slope, intercept.

ECE = sum over 15 bins of equal width of |bin's frequency - bin's mean probability| x bin's share of the rows (Guo et
al., 2017), here of the positive class. Brier score = mean (p - y)^2. Slope b and intercept a are those of
logit P(y = 1) = a + b z, z the log-odds (Cox, 1958): b < 1 says that probabilities are too extreme. The calibration in
the large is a with b = 1.
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

from .checks import labels_and_probabilities, labels_and_scores, some

Array = NDArray[np.float64]
BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Bins of as many rows each (up to ties), from the least probability to the highest; arrays of one length."""

    probability: Array
    """Mean of the bin."""
    frequency: Array
    """Share of positives."""
    low: Array
    high: Array
    """Wilson's 95 % interval of the frequency."""
    rows: NDArray[np.int64]


def reliability(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> Reliability:
    """The reliability curve of rows (n,) in bins of equal counts; equal probabilities are never parted."""
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


def in_bin(probabilities: Array) -> NDArray[np.int64]:
    """The bin of equal width, of `BINS`, that each probability lies in; the last one holds 1."""
    return np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)


def expected_error(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """ECE of rows (n,)."""
    truth, p = labels_and_probabilities(labels, probabilities)
    return float(Binned(truth, some(p)).expected_error(np.ones((1, len(p))))[0])


class Binned:
    """Rows (n,) in the bins of the ECE, to be weighted; quickest where they are sorted by their probability."""

    def __init__(self, truth: Array, probabilities: Array) -> None:
        self._left = truth - probabilities
        bins = in_bin(probabilities)
        self._starts = np.flatnonzero(np.append(True, bins[1:] != bins[:-1]))
        self._bins = np.eye(BINS)[bins[self._starts]]

    def expected_error(self, weights: Array) -> Array:
        """ECE (b,) of the rows with weights (b, n)."""
        runs = np.add.reduceat(weights * self._left, self._starts, axis=1)
        return np.abs(runs @ self._bins).sum(1) / weights.sum(1)


def slope_and_intercept(labels: ArrayLike, log_odds: ArrayLike) -> tuple[float, float] | None:
    """Cox's slope and intercept; None if the scores part the classes or are infinite, where they are not finite."""
    truth, [z] = labels_and_scores(labels, log_odds)
    if not np.isfinite(z).all() or _parted(truth, z):
        return None
    # Standardised, the optimiser sees numbers of order one whatever the network's scale.
    middle, spread = float(z.mean()), float(z.std())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that did not end shows in its gradient
        model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        model.fit(((z - middle) / spread)[:, None], truth)
    slope = float(np.ravel(model.coef_)[0]) / spread
    intercept = float(np.ravel(model.intercept_)[0]) - slope * middle
    left = expit(intercept + slope * z) - truth
    return (slope, intercept) if abs(left.sum()) < 1e-6 * len(z) else None


def in_the_large(labels: ArrayLike, log_odds: ArrayLike) -> float | None:
    """The shift of all log-odds that makes the mean probability the frequency; None with one class or infinite odds."""
    truth, [z] = labels_and_scores(labels, log_odds)
    if not np.isfinite(z).all() or truth.all() or not truth.any():
        return None
    reach = float(np.abs(z).max()) + float(np.log(len(z))) + 1
    frequency = truth.mean()
    return float(brentq(lambda shift: float(np.mean(expit(z + shift)) - frequency), -reach, reach))  # pyright: ignore


def _parted(truth: NDArray[np.bool_], z: Array) -> bool:
    """Whether a threshold parts the classes, with one class or one value too: the fit then has no finite maximum."""
    if truth.all() or not truth.any() or z.min() == z.max():
        return True
    return bool(z[truth].min() >= z[~truth].max() or z[truth].max() <= z[~truth].min())
