"""Bootstrap intervals over patients: all rows of a patient are resampled together, because they are not independent.

A resample is a weight per row, the number of times that its patient was drawn. Statistics are weighted sums over rows,
so thousands of resamples are a few matrix operations, where calls of scikit-learn would take minutes. Percentile
intervals and standard errors as in Efron and Tibshirani (1993).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import Array

Statistics = Callable[[Array], Mapping[str, Array]]
"""Weights (resamples, rows) -> values (resamples,) by name, NaN where undefined."""
_AT_ONCE = 2**19  # weights in memory at a time, to fit into the cache


@dataclass(frozen=True)
class Spread:
    """The variation of a statistic over the resamples.

    Attributes:
        interval: the middle 95 %.
        error: the standard deviation, an estimate of the statistic's standard error.
        why: the reason if there is neither.
    """

    interval: tuple[float, float] | None
    error: float | None
    why: str = ""

    def listed(self) -> dict[str, Any]:
        """The values for a measure's dictionary."""
        found = {"bootstrap": None if self.interval is None else list(self.interval), "standard_error": self.error}
        return found | ({"why": self.why} if self.why else {})


def listed(value: float, spread: Spread, undefined: str) -> dict[str, Any]:
    """A measure with its spread; `undefined` is the reason if the value is NaN."""
    if np.isnan(value):
        return {"value": None, **Spread(None, None, undefined).listed()}
    return {"value": float(value), **spread.listed()}


class Resamples:
    """Patients drawn with replacement; the same seed gives the same draws.

    Args:
        clusters: the patient of each row.
        count: number of resamples.
        seed: of the random numbers.
    """

    def __init__(self, clusters: Sequence[str], count: int = 2000, seed: int = 0) -> None:
        names = {name: number for number, name in enumerate(sorted(set(clusters)))}
        self._of_row = np.fromiter((names[name] for name in clusters), np.int64, len(clusters))
        self.patients, self.count, self._seed = len(names), count, seed

    def weights(self, rows: NDArray[Any] | None = None) -> Iterator[Array]:
        """Batches of weights (resamples, rows), float64, of all rows, or of those that a mask or indices select."""
        of_row = self._of_row if rows is None else self._of_row[rows]
        step = max(1, min(self.count, _AT_ONCE // max(len(of_row), self.patients, 1)))
        random = np.random.default_rng(self._seed)
        for first in range(0, self.count, step):
            some = min(step, self.count - first)
            drawn = random.integers(0, self.patients, (some, self.patients))
            drawn += np.arange(some)[:, None] * self.patients
            # Gathering bytes is several times faster than words; a patient is never drawn more than 255 times.
            draws = np.bincount(drawn.ravel(), minlength=drawn.size).astype(np.uint8).reshape(drawn.shape)
            yield draws.take(of_row, axis=1).astype(np.float64)

    def values(self, statistics: Statistics, rows: NDArray[Any] | None = None) -> dict[str, Array]:
        """The values (count,) of each statistic over the resamples, by name."""
        parts: list[Mapping[str, Array]] = [statistics(weights) for weights in self.weights(rows)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def spreads(self, statistics: Statistics, rows: NDArray[Any] | None = None) -> dict[str, Spread]:
        """The spread of each statistic."""
        return {name: self.spread(values) for name, values in self.values(statistics, rows).items()}

    def spread(self, values: Array) -> Spread:
        """The spread of values (count,) of the resamples.

        A statistic is undefined in a resample without positive or negative patients; if more than a tenth are
        undefined, there is no interval. Intervals of width 0 would claim certainty and are omitted: for a single
        patient, or equal values in all resamples (a perfect ranking is perfect in every resample).
        """
        defined = values[~np.isnan(values)]
        if self.patients < 2:
            return Spread(None, None, "no interval: all rows are of one patient")
        if len(defined) < 0.9 * len(values) or not len(defined):
            return Spread(None, None, "no interval: too few patients, resamples often lack a class")
        low, high = (float(side) for side in np.quantile(defined, [0.025, 0.975]))
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            return Spread(None, None, "no interval: the same in every resample of patients")
        return Spread((low, high), float(defined.std(ddof=1)))
