"""ROC and precision-recall curves for many weightings of the same rows at once, for bootstrap intervals.

Negatives and positives are each sorted once by increasing score. For each weighting, the cumulative weights of both
classes below each score determine all measures. A million rows take about ten milliseconds per weighting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import Array, labels_and_scores

Places = NDArray[np.int64]
# Tolerance for rounding of a rate that should be exactly on the limit.
_SLACK = 1e-9


@dataclass(frozen=True)
class _Class:
    """The rows of one class by increasing score.

    Attributes:
        scores: (n,).
        below, upto: for each row, the number of rows of the other class with a lower score, and with at most its score.
        first, last: for each row, the start and end of the rows with its score.
    """

    scores: Array
    below: Places
    upto: Places
    first: Places
    last: Places

    @classmethod
    def of(cls, scores: Array, others: Array) -> _Class:
        """The rows of a class, from sorted scores of both classes."""
        sides = [np.searchsorted(of, scores, side) for of in (others, scores) for side in ("left", "right")]
        return cls(scores, *sides)


class WeightedCurves:
    """The curves of rows with weights.

    Args:
        labels: (n,) 1 or 0.
        scores: (n,), larger for 1; the thresholds are its distinct values.

    Attributes:
        order: (n,) rows, negatives and then positives, each by increasing score. Rows in this order need not be sorted
            for weighting.
    """

    def __init__(self, labels: ArrayLike, scores: ArrayLike) -> None:
        truth, [values] = labels_and_scores(labels, scores)
        self.order = np.lexsort((values, truth))
        self._sorted = bool((self.order == np.arange(len(values))).all())
        by_class = np.split(values[self.order], [int((~truth).sum())])
        self._rows = (_Class.of(*by_class), _Class.of(*by_class[::-1]))
        turned = [-one[::-1] for one in by_class]
        self._turned = (_Class.of(*turned[::-1]), _Class.of(*turned))
        distinct = np.unique(values)[::-1]
        self._above = [np.searchsorted(one, distinct, "left") for one in by_class]

    def __call__(self, weights: Array) -> Curves:
        """The curves for weights (b, n), in the order of the input rows."""
        by_class = np.split(weights if self._sorted else weights[:, self.order], [len(self._rows[0].scores)], axis=1)
        sums = [np.empty((len(weights), one.shape[1] + 1)) for one in by_class]
        for one, sum_ in zip(by_class, sums, strict=True):
            sum_[:, 0] = 0
            np.cumsum(one, 1, out=sum_[:, 1:])
        return Curves(self._rows, self._turned, by_class[0], by_class[1], sums[0], sums[1], self._above)


@dataclass(frozen=True)
class Curves:
    """The curves of b weightings. Measures are NaN for weightings without positives or without negatives.

    Attributes:
        rows: the negatives (n) and the positives (m).
        turned: those of the mirrored curves.
        of_negatives, of_positives: their weights (b, n) and (b, m).
        negatives, positives: the cumulative weights of the first k (b, n + 1) and (b, m + 1).
        above: for each threshold, from the highest, the number of negatives and positives below it.
    """

    rows: tuple[_Class, _Class]
    turned: tuple[_Class, _Class]
    of_negatives: Array
    of_positives: Array
    negatives: Array
    positives: Array
    above: Sequence[Places]

    @property
    def all_negatives(self) -> Array:
        """The total weight (b, 1) of negatives."""
        return self.negatives[:, -1:]

    @property
    def all_positives(self) -> Array:
        """The total weight (b, 1) of positives."""
        return self.positives[:, -1:]

    def counts(self) -> tuple[Array, Array]:
        """True and false positives (b, thresholds), from the highest threshold."""
        return (
            self.all_positives - self.positives[:, self.above[1]],
            self.all_negatives - self.negatives[:, self.above[0]],
        )

    def auc(self) -> Array:
        """Area under the ROC curve (b,); ties count half."""
        [_, positive] = self.rows
        passed = self.negatives[:, positive.below] + self.negatives[:, positive.upto]
        pairs = self.all_positives * self.all_negatives
        return ratio(np.einsum("ij,ij->i", self.of_positives, passed) / 2, pairs[:, 0])

    def average_precision(self) -> Array:
        """Average precision (b,): sum over thresholds of (step of recall) x precision."""
        [_, positive] = self.rows
        true = self.all_positives - self.positives[:, positive.first]
        above = true + self.all_negatives - self.negatives[:, positive.below]
        precision = np.divide(true, above, out=np.zeros_like(true), where=above > 0)
        return ratio(np.einsum("ij,ij->i", self.of_positives, precision), self.all_positives[:, 0])

    def sensitivity_at(self, specificity: float) -> Array:
        """The highest sensitivity (b,) of a threshold with at least this specificity."""
        needed = specificity * self.all_negatives[:, 0] - _SLACK
        k = np.count_nonzero(self.negatives < needed[:, None], axis=1)  # negatives that must be below the threshold
        upto = self.rows[0].upto
        below = np.where(k > 0, upto[np.maximum(k - 1, 0)], 0) if len(upto) else k
        missed = self.positives[np.arange(len(k)), below]
        found = 1 - ratio(missed, self.all_positives[:, 0])
        return np.where(self.all_negatives[:, 0] > 0, found, np.nan)

    def specificity_at(self, sensitivity: float) -> Array:
        """The highest specificity (b,) of a threshold with at least this sensitivity."""
        return self.mirrored.sensitivity_at(sensitivity)

    @cached_property
    def mirrored(self) -> Curves:
        """The curves with classes and signs exchanged, so that sensitivity becomes specificity."""
        return Curves(
            self.turned,
            self.rows,
            self.of_positives[:, ::-1],
            self.of_negatives[:, ::-1],
            self.all_positives - self.positives[:, ::-1],
            self.all_negatives - self.negatives[:, ::-1],
            (),
        )

    def partial_area(self, least: float) -> Array:
        """Area (b,) under the ROC curve over specificities from `least` to 1, from 0 to 1 - least."""
        [negative, _] = self.rows
        total = self.all_positives
        last, part, top, rise = self._cut(least * self.all_negatives)
        begin = int(last.min())
        missed = self.positives[:, negative.below[begin:]] + self.positives[:, negative.upto[begin:]]
        counted = self.of_negatives[:, begin:] * (np.arange(begin, len(negative.scores)) >= last)
        whole = np.einsum("ij,ij->i", counted, total - missed / 2)
        return ratio(whole + (part * (top + rise / 2))[:, 0], (total * self.all_negatives)[:, 0])

    def rates(self, grid: Sequence[float] | Array) -> Array:
        """Sensitivity (b, len(grid)) at false positive rates, linearly interpolated between points of each curve."""
        _, _, top, rise = self._cut((1 - np.asarray(grid, np.float64)) * self.all_negatives)
        defined = (self.all_negatives > 0) & (self.all_positives > 0)
        return np.where(defined, ratio(top + rise, np.broadcast_to(self.all_positives, top.shape)), np.nan)

    def _cut(self, below: Array) -> tuple[Places, Array, Array, Array]:
        """The point of the ROC curve below which the given weight of negatives (b, g) lies.

        Between the thresholds of a score, the curve is linear in the weights of its negatives and positives.

        Returns:
            The end of the negatives with the point's score, the weight of these that is above the point, the weight of
            positives with higher scores, and the interpolated weight of positives with this score; (b, g) each.
        """
        [negative, _] = self.rows
        row = np.arange(len(below))[:, None]
        if below.shape[1] == 1:
            sought = np.count_nonzero(self.negatives <= below, axis=1)[:, None]
        else:  # one search per row, because there are many grid points
            some = [np.searchsorted(sums, of, "right") for sums, of in zip(self.negatives, below, strict=True)]
            sought = np.array(some, np.int64)
        k = np.clip(sought - 1, 0, len(negative.scores) - 1)
        last = negative.last[k]
        end, passed = self.negatives[row, last], self.positives[row, negative.upto[k]]
        width = end - self.negatives[row, negative.first[k]]
        part = np.minimum(end - below, width)
        share = np.divide(part, width, out=np.zeros_like(part), where=width > 0)
        return last, part, self.all_positives - passed, (passed - self.positives[row, negative.below[k]]) * share


def ratio(above: Array, below: Array) -> Array:
    """The ratio of arrays; NaN where the denominator is 0."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
