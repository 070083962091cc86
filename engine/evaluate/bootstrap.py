"""Intervals from resampled patients: all rows of a patient come together, for they are not independent.

A resample is a weight per row, the number of times that its patient was drawn. What a statistic needs is a sum over
rows times weights, so thousands of resamples are a few sums of a matrix; calling scikit-learn for each would take
minutes. Efron and Tibshirani (1993), percentile intervals and standard errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistics = Callable[[Array], Mapping[str, Array]]
"""(resamples, rows) weights -> (resamples,) values by name, NaN where not defined."""
_AT_ONCE = 2**19  # weights that are held at a time: few enough to stay in the cache


@dataclass(frozen=True)
class Spread:
    """How a statistic varies over the resamples.

    Attributes:
        interval: the middle 95 %.
        error: the standard deviation, an estimate of the statistic's standard error.
        why: where there is neither.
    """

    interval: tuple[float, float] | None
    error: float | None
    why: str = ""

    def listed(self) -> dict[str, Any]:
        """As it stands in a measure."""
        found = {"bootstrap": None if self.interval is None else list(self.interval), "standard_error": self.error}
        return found | ({"why": self.why} if self.why else {})


def listed(value: float, spread: Spread, undefined: str) -> dict[str, Any]:
    """A measure with how it varies; `undefined` tells why there is none where the value is NaN."""
    if np.isnan(value):
        return {"value": None, **Spread(None, None, undefined).listed()}
    return {"value": float(value), **spread.listed()}


class Resamples:
    """Patients drawn with replacement; the same seed gives the same draws.

    Args:
        clusters: the patient of each row.
        count: resamples.
    """

    def __init__(self, clusters: Sequence[str], count: int = 2000, seed: int = 0) -> None:
        names = {name: number for number, name in enumerate(sorted(set(clusters)))}
        self._of_row = np.fromiter((names[name] for name in clusters), np.int64, len(clusters))
        self.patients, self.count, self._seed = len(names), count, seed

    def weights(self, rows: NDArray[Any] | None = None) -> Iterator[Array]:
        """Weights (some resamples, rows), float64, of all rows, of a mask or in the order of numbers of rows."""
        of_row = self._of_row if rows is None else self._of_row[rows]
        step = max(1, min(self.count, _AT_ONCE // max(len(of_row), self.patients, 1)))
        random = np.random.default_rng(self._seed)
        for first in range(0, self.count, step):
            some = min(step, self.count - first)
            drawn = random.integers(0, self.patients, (some, self.patients))
            drawn += np.arange(some)[:, None] * self.patients
            # Bytes are gathered several times as fast as words; a patient is drawn 255 times never.
            draws = np.bincount(drawn.ravel(), minlength=drawn.size).astype(np.uint8).reshape(drawn.shape)
            yield draws.take(of_row, axis=1).astype(np.float64)

    def values(self, statistics: Statistics, rows: NDArray[Any] | None = None) -> dict[str, Array]:
        """Each statistic of each resample: (count,) by name."""
        parts: list[Mapping[str, Array]] = [statistics(weights) for weights in self.weights(rows)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def spreads(self, statistics: Statistics, rows: NDArray[Any] | None = None) -> dict[str, Spread]:
        """The spread of each statistic."""
        return {name: self.spread(values) for name, values in self.values(statistics, rows).items()}

    def spread(self, values: Array) -> Spread:
        """The spread of values (count,) of the resamples, where they have any.

        A statistic is not defined in a resample that drew no positive patient, or no negative one; if more than a tenth
        are not, there is no interval. Nor is there one of width 0, which would claim to be sure: of one patient, and
        where every resample has the same value (a perfect ranking stays perfect however it is resampled).
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
