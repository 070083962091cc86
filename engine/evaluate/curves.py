"""The ROC and precision-recall curve of many weightings of the same rows at once: what intervals are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
# A rate that should be exactly on the limit may miss it by a rounding.
_SLACK = 1e-9


class WeightedCurves:
    """The counts above each threshold of rows with weights.

    Args:
        labels: (n,) 1 or 0.
        scores: (n,), larger for 1; the thresholds are its distinct values.
    """

    def __init__(self, labels: ArrayLike, scores: ArrayLike) -> None:
        values = np.asarray(scores, np.float64)
        self._order = np.argsort(-values, kind="stable")
        sorted_ = values[self._order]
        self._ends = np.flatnonzero(np.append(sorted_[1:] != sorted_[:-1], True))
        self.thresholds: Array = sorted_[self._ends]
        self._positive = (np.asarray(labels) > 0)[self._order]

    def counts(self, weights: Array) -> tuple[Array, Array]:
        """Weights (b, n) -> true and false positives (b, thresholds), from the highest threshold on."""
        sorted_ = weights[:, self._order]
        true = np.cumsum(sorted_ * self._positive, 1)[:, self._ends]
        return true, np.cumsum(sorted_ * ~self._positive, 1)[:, self._ends]


def auc(true: Array, false: Array) -> Array:
    """Area under the ROC curve (b,) by trapezoids; NaN without positives or negatives."""
    zero = np.zeros((len(true), 1))
    steps, heights = np.diff(false, prepend=zero), true + np.concatenate([zero, true[:, :-1]], 1)
    return _ratio((steps * heights).sum(1) / 2, true[:, -1] * false[:, -1])


def average_precision(true: Array, false: Array) -> Array:
    """sum over thresholds of (step of recall) x precision (b,); NaN without positives."""
    steps = np.diff(true, prepend=np.zeros((len(true), 1)))
    above = true + false
    precision = np.divide(true, above, out=np.zeros_like(true), where=above > 0)
    return _ratio((steps * precision).sum(1), true[:, -1])


def sensitivity_at(true: Array, false: Array, specificity: float) -> Array:
    """The highest sensitivity (b,) of a threshold whose specificity is at least that."""
    limit = (1 - specificity) * false[:, -1:] + _SLACK
    last = (false <= limit).sum(1) - 1  # -1: only the threshold above all scores, with sensitivity 0
    at = np.where(last >= 0, np.take_along_axis(true, np.maximum(last, 0)[:, None], 1)[:, 0], 0.0)
    return np.where(false[:, -1] > 0, _ratio(at, true[:, -1]), np.nan)


def specificity_at(true: Array, false: Array, sensitivity: float) -> Array:
    """The highest specificity (b,) of a threshold whose sensitivity is at least that."""
    needed = sensitivity * true[:, -1:] - _SLACK
    first = (true < needed).sum(1)
    at = np.take_along_axis(false, np.minimum(first, false.shape[1] - 1)[:, None], 1)[:, 0]
    at = np.where(sensitivity <= 0, 0.0, at)
    return np.where(true[:, -1] > 0, 1 - _ratio(at, false[:, -1]), np.nan)


def rates(true: Array, false: Array, grid: Sequence[float] | Array) -> Array:
    """Sensitivity (b, len(grid)) at false positive rates: linear between the points of each curve."""
    found = np.full((len(true), len(grid)), np.nan)
    for row, (t, f) in enumerate(zip(true, false, strict=True)):
        if t[-1] > 0 and f[-1] > 0:
            found[row] = np.interp(grid, np.append(0, f / f[-1]), np.append(0, t / t[-1]))
    return found


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
