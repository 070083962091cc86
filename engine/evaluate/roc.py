"""Area under the ROC curve (AUC), its variance, and the test of a difference of two.

With m positives X, n negatives Y and psi(x, y) = 1, 1/2, 0 for x >, =, < y, the AUC is the mean of psi over all pairs.
DeLong, DeLong and Clarke-Pearson (1988): the components V10(X_i) = mean_j psi(X_i, Y_j) and V01(Y_j) = mean_i psi(X_i,
Y_j) give the covariance matrix S10 / m + S01 / n of the AUCs of several scores, where S10 and S01 are the sample
covariances of the components. They are computed from mid-ranks in O(n log n) (Sun and Xu, 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_auc_score

from ..errors import DataError
from .checks import Array, UndefinedError, by_class, classes_of, labels_and_scores
from .curves import WeightedCurves

_Z95 = float(norm.ppf(0.975))


def auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """AUC of scores (n,) that are larger for label 1; None if there is only one class.

    Raises:
        DataError: for labels other than 1 or 0, or NaN scores; as in all functions of this module.
    """
    truth, [values] = labels_and_scores(labels, scores)
    return float(roc_auc_score(truth, ranks(values))) if truth.any() and not truth.all() else None


@dataclass(frozen=True)
class PartialArea:
    """The area under a part of the ROC curve."""

    raw: float
    """The area, at most the width of the part."""
    standardised: float
    """0.5 for chance, 1 for a perfect ranking, for any part (McClish, 1989)."""


def partial_auc(
    labels: ArrayLike, scores: ArrayLike, least: float, over: Literal["specificity", "sensitivity"] = "specificity"
) -> PartialArea | None:
    """The area under the ROC curve over specificities (or sensitivities) from `least` to 1; None with only one class.

    `least=0.9` corresponds to scikit-learn's ``max_fpr=0.1``, which returns the standardised area.
    """
    if not 0 <= least < 1:
        raise DataError(f"a partial area must begin at a rate from 0 to below 1, not {least:g}")
    truth, [values] = labels_and_scores(labels, scores)
    if truth.all() or not truth.any():
        return None
    curves = WeightedCurves(truth, values)(np.ones((1, len(truth))))
    raw = (curves if over == "specificity" else curves.mirrored).partial_area(least)
    return PartialArea(float(raw[0]), float(standardised(raw, least)[0]))


def standardised(area: Array, least: float) -> Array:
    """McClish's standardised areas over rates from `least` to 1; for e = 1 - least, chance is e^2 / 2, the best e."""
    width = 1 - least
    return (1 + (area - width**2 / 2) / (width - width**2 / 2)) / 2


def ranks(scores: ArrayLike) -> Array:
    """Dense ranks of scores (n,), equal for equal scores; infinite scores are allowed."""
    return np.unique(np.asarray(scores, np.float64), return_inverse=True)[1].astype(np.float64)


def macro_auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """The mean AUC over the classes, each against the rest.

    Args:
        labels: class (n,) of each row, from 0.
        scores: (n, classes), each column larger for its class. Of two columns only the second counts.

    Returns:
        The mean over the classes that occur; None if fewer than two do.
    """
    values = by_class(scores)
    truth = classes_of(labels, values.shape[1])
    if len(np.unique(truth)) < 2:
        return None
    if values.shape[1] == 2:
        return auc(truth == 1, values[:, 1])
    found = [auc(truth == c, values[:, c]) for c in range(values.shape[1])]
    return float(np.mean([area for area in found if area is not None]))


def labelwise_auc(truth: ArrayLike, scores: ArrayLike) -> tuple[float | None, list[float | None]]:
    """The AUCs of several labels, and the mean of those that are defined.

    Args:
        truth: (n, labels) 1 or 0; NaN where unknown.
        scores: (n, labels).
    """
    known, values = np.asarray(truth, np.float64), by_class(scores)
    if known.shape != values.shape:
        raise DataError(f"labels have shape {known.shape} and scores {values.shape}; both must have a column per label")
    found = []
    for column in range(known.shape[1]):
        rows = ~np.isnan(known[:, column])
        found.append(auc(known[rows, column], values[rows, column]))
    defined = [area for area in found if area is not None]
    return (float(np.mean(defined)) if defined else None), found


def delong(labels: ArrayLike, scores: Sequence[ArrayLike]) -> tuple[Array, Array]:
    """The AUCs (k,) of k scores of the same rows, and their covariance matrix (k, k).

    Args:
        labels: (n,) 1 or 0, at least two of each.
        scores: k arrays (n,).

    Raises:
        UndefinedError: for fewer than two positives or negatives, because the variance is undefined.
        DataError: see `auc`.
    """
    truth, columns = labels_and_scores(labels, *scores)
    m, n = int(truth.sum()), int((~truth).sum())
    if m < 2 or n < 2:
        raise UndefinedError(f"DeLong's variance needs two positives and two negatives, not {m} and {n}")
    v10, v01 = components(truth, columns)
    return v10.mean(1), np.atleast_2d(np.cov(v10) / m + np.cov(v01) / n)


def components(truth: NDArray[np.bool_], scores: Sequence[Array]) -> tuple[Array, Array]:
    """V10 (k, m) of the positives and V01 (k, n) of the negatives, for k scores (rows,)."""
    m, n = int(truth.sum()), int((~truth).sum())
    v10, v01 = np.empty((len(scores), m)), np.empty((len(scores), n))
    for k, values in enumerate(scores):
        positives, negatives = values[truth], values[~truth]
        together = rankdata(np.concatenate([positives, negatives]))
        v10[k] = (together[:m] - rankdata(positives)) / n
        v01[k] = 1 - (together[m:] - rankdata(negatives)) / m
    return v10, v01


def delong_error(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """DeLong's standard error of the AUC; None if undefined or 0 (perfect ranking)."""
    try:
        _, [[variance]] = delong(labels, [scores])
    except UndefinedError:
        return None
    return float(np.sqrt(variance)) if variance > 0 else None


def delong_interval(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float] | None:
    """The 95 % interval of the AUC, clipped to [0, 1]; None without `delong_error`."""
    return interval_of(auc(labels, scores), delong_error(labels, scores))


def interval_of(area: float | None, error: float | None) -> tuple[float, float] | None:
    """The normal 95 % interval of an AUC, clipped to [0, 1]."""
    if error is None or area is None:
        return None
    return max(0.0, area - _Z95 * error), min(1.0, area + _Z95 * error)


def area_with_interval(truth: Array, scores: Array) -> dict[str, Any]:
    """The AUC of rows (n,) with DeLong's interval and standard error, which are None without `delong_error`."""
    area, error = auc(truth, scores), delong_error(truth, ranks(scores))
    interval = interval_of(area, error)
    return {"value": area, "delong": interval and list(interval), "delong_standard_error": error}


@dataclass(frozen=True)
class Paired:
    """The AUCs of two scores of the same rows, and DeLong's test of equality."""

    first: float
    second: float
    difference: float
    """Second minus first."""
    interval: tuple[float, float] | None
    """95 % interval of the difference."""
    z: float | None
    p: float | None
    """Two-sided; None if the variance of the difference is 0."""


def paired_delong(labels: ArrayLike, first: ArrayLike, second: ArrayLike) -> Paired:
    """Compare two scores (n,) of the same rows; raises `UndefinedError` like `delong`."""
    (a, b), covariance = delong(labels, [first, second])
    difference = float(b - a)
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    # Equal scores differ only by rounding.
    if variance <= 1e-15 * max(1e-300, float(covariance[0, 0] + covariance[1, 1])):
        return Paired(float(a), float(b), difference, None, None, None)
    deviation = float(np.sqrt(variance))
    z = difference / deviation
    half = _Z95 * deviation
    return Paired(float(a), float(b), difference, (difference - half, difference + half), z, float(2 * norm.sf(abs(z))))
