"""What the measures take: labels 1 or 0 and scores that are numbers. Anything else would be counted as something."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError

Array = NDArray[np.float64]


class NotANumber(DataError):
    """A score or label is NaN: of a network, its training has diverged."""


def numbers(values: ArrayLike, name: str = "scores") -> Array:
    """Values as float64, infinite ones too; `DataError` for NaN and for what is no number."""
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} are no numbers ({error})") from error
    bad = np.argwhere(np.isnan(found))
    if len(bad):
        raise NotANumber(f"{name}: row {bad[0][0]} is not a number (NaN); leave it out")
    return found


def truth_of(labels: ArrayLike) -> NDArray[np.bool_]:
    """Labels (n,) 1 or 0 as truth values; `DataError` for any other value, such as NaN or -1 for "not known"."""
    found = numbers(labels, "labels")
    bad = np.flatnonzero((found != 0) & (found != 1))
    if len(bad):
        raise DataError(f"labels: row {bad[0]} is {found[bad[0]]:g}; labels are 1 or 0, leave out rows without one")
    return found == 1


def labels_and_scores(labels: ArrayLike, *scores: ArrayLike) -> tuple[NDArray[np.bool_], list[Array]]:
    """Truth (n,) and scores (n,) each; `DataError` as above, and for lengths that differ."""
    truth, values = truth_of(labels), [numbers(each) for each in scores]
    for each in values:
        if each.shape != truth.shape or truth.ndim != 1:
            raise DataError(
                f"labels are of shape {truth.shape} and scores of {each.shape}; both are one row of numbers"
            )
    return truth, values


def labels_and_probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Array, Array]:
    """Labels and probabilities (n,), both float64; `DataError` for numbers below 0 or above 1, too."""
    truth, [p] = labels_and_scores(labels, probabilities)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("probabilities: there are numbers below 0 or above 1")
    return truth.astype(np.float64), p


def by_class(scores: ArrayLike) -> Array:
    """Scores (n, classes); `DataError` for another shape."""
    found = numbers(scores)
    if found.ndim != 2:
        raise DataError(f"scores are of shape {found.shape}; each row has one for each class or label")
    return found


def some(values: Array) -> Array:
    """Values of which there is one at least; `DataError` for none, which have no mean."""
    if not len(values):
        raise DataError("there are no rows to measure")
    return values


def classes_of(labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Numbers of classes (n,) from 0; `DataError` for any other value."""
    found = numbers(labels, "labels")
    bad = np.flatnonzero((found < 0) | (found >= classes) | (found != np.floor(found)))
    if len(bad):
        raise DataError(f"labels: row {bad[0]} is {found[bad[0]]:g}; classes are numbered from 0 to {classes - 1}")
    return found.astype(np.int64)
