"""Intervals from resampled patients: all rows of a patient come together, for they are not independent.

A resample is a weight per row, the number of times that its patient was drawn. What a statistic needs is a sum over
rows times weights, so thousands of resamples are a few sums of a matrix; calling scikit-learn for each would take
minutes. Efron and Tibshirani (1993), percentile intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistics = Callable[[Array], Mapping[str, Array]]
"""(resamples, rows) weights -> (resamples,) values by name, NaN where not defined."""
_AT_ONCE = 2**21  # weights that are held at a time


class Resamples:
    """Patients drawn with replacement; the same seed gives the same draws.

    Args:
        clusters: the patient of each row.
        count: resamples.
    """

    def __init__(self, clusters: Sequence[str], count: int = 2000, seed: int = 0) -> None:
        names, self._of_row = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
        self.patients, self.count = len(names), count
        random = np.random.default_rng(seed)
        self._draws = np.empty((count, self.patients), np.uint8)  # a patient is drawn 255 times never
        for one in range(count):
            drawn = random.integers(0, self.patients, self.patients)
            self._draws[one] = np.bincount(drawn, minlength=self.patients)

    def weights(self, rows: NDArray[np.bool_] | None = None) -> Iterator[Array]:
        """Weights (some resamples, rows), float64, of all rows or those of a mask, some at a time."""
        of_row = self._of_row if rows is None else self._of_row[rows]
        step = max(1, _AT_ONCE // max(len(of_row), 1))
        for first in range(0, self.count, step):
            yield self._draws[first : first + step][:, of_row].astype(np.float64)

    def values(self, statistics: Statistics, rows: NDArray[np.bool_] | None = None) -> dict[str, Array]:
        """Each statistic of each resample: (count,) by name."""
        parts: list[Mapping[str, Array]] = [statistics(weights) for weights in self.weights(rows)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def intervals(
        self, statistics: Statistics, rows: NDArray[np.bool_] | None = None
    ) -> dict[str, tuple[float, float] | None]:
        """The 95 % percentile interval of each statistic; see `interval`."""
        return {name: interval(values) for name, values in self.values(statistics, rows).items()}


def interval(values: Array) -> tuple[float, float] | None:
    """The middle 95 % of the defined values; None if more than a tenth of them is not defined.

    A statistic is not defined in a resample that drew no positive patient, or no negative one.
    """
    defined = values[~np.isnan(values)]
    if len(defined) < 0.9 * len(values) or not len(defined):
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)
