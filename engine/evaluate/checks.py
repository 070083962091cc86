"""Checks of the inputs of measures: labels must be 1 or 0, and scores must be numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError

Array = NDArray[np.float64]


class UndefinedError(DataError):
    """A measure is undefined for these rows, for example because all have one label."""


class NotANumber(DataError):
    """A score or label is NaN, for example after a network's training has diverged."""


def numbers(values: ArrayLike, name: str = "scores") -> Array:
    """Values as float64, including infinite ones; raises `DataError` for NaN and other types."""
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be numbers ({error})") from error
    bad = np.argwhere(np.isnan(found))
    if len(bad):
        raise NotANumber(f"{name}: row {bad[0][0]} is not a number (NaN); omit it")
    return found


def truth_of(labels: ArrayLike) -> NDArray[np.bool_]:
    """Labels (n,) 1 or 0 as booleans; raises `DataError` for other values, such as NaN or -1 for unknown."""
    found = numbers(labels, "labels")
    bad = np.flatnonzero((found != 0) & (found != 1))
    if len(bad):
        raise DataError(f"labels: row {bad[0]} is {found[bad[0]]:g}; labels must be 1 or 0, omit rows without one")
    return found == 1


def labels_and_scores(labels: ArrayLike, *scores: ArrayLike) -> tuple[NDArray[np.bool_], list[Array]]:
    """Truth (n,) and arrays of scores (n,); raises `DataError` like `truth_of`, and for different lengths."""
    truth, values = truth_of(labels), [numbers(each) for each in scores]
    for each in values:
        if each.shape != truth.shape or truth.ndim != 1:
            raise DataError(f"labels have shape {truth.shape} and scores {each.shape}; both must be one row of numbers")
    return truth, values


def labels_and_probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Array, Array]:
    """Labels and probabilities (n,), both float64; also raises `DataError` for numbers below 0 or above 1."""
    truth, [p] = labels_and_scores(labels, probabilities)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("probabilities must be between 0 and 1")
    return truth.astype(np.float64), p


def by_class(scores: ArrayLike) -> Array:
    """Scores (n, classes); raises `DataError` for other shapes."""
    found = numbers(scores)
    if found.ndim != 2:
        raise DataError(f"scores have shape {found.shape}; each row must have one per class or label")
    return found


def some(values: Array) -> Array:
    """The values; raises `DataError` if there are none."""
    if not len(values):
        raise DataError("there are no rows to measure; pass at least one")
    return values


def classes_of(labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Indices of classes (n,) from 0; raises `DataError` for other values."""
    found = numbers(labels, "labels")
    bad = np.flatnonzero((found < 0) | (found >= classes) | (found != np.floor(found)))
    if len(bad):
        raise DataError(f"labels: row {bad[0]} is {found[bad[0]]:g}; classes must be from 0 to {classes - 1}")
    return found.astype(np.int64)
