"""Area under the ROC curve, its variance, and the test of a difference of two.

With m positives X, n negatives Y and psi(x, y) = 1, 1/2, 0 for x >, =, < y, the area is the mean of psi over all
pairs. DeLong, DeLong and Clarke-Pearson (1988): the components V10(X_i) = mean_j psi(X_i, Y_j) and V01(Y_j) =
mean_i psi(X_i, Y_j) give the covariance matrix S10 / m + S01 / n of the areas of several scores, S10 and S01 being the
sample covariances of the components. They follow from mid-ranks in O(n log n) (Sun and Xu, 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_auc_score

Array = NDArray[np.float64]
_Z95 = float(norm.ppf(0.975))


def auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve of scores (n,) that are larger for label 1; None with one class only."""
    truth, values = np.asarray(labels) > 0, ranks(scores)
    return float(roc_auc_score(truth, values)) if truth.any() and not truth.all() else None


def ranks(scores: ArrayLike) -> Array:
    """Scores (n,) as their places in the sorted list, equal where equal: infinite scores keep their order too."""
    return np.unique(np.asarray(scores, np.float64), return_inverse=True)[1].astype(np.float64)


def macro_auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """The mean area over the classes, each against the rest.

    Args:
        labels: class (n,) of each row, from 0.
        scores: (n, classes), each column larger for its class. Of two columns the second alone counts.

    Returns:
        None where fewer than two classes occur; classes that do not occur are omitted from the mean.
    """
    truth, values = np.asarray(labels), np.asarray(scores)
    if len(np.unique(truth)) < 2:
        return None
    if values.shape[1] == 2:
        return auc(truth == 1, values[:, 1])
    found = [auc(truth == c, values[:, c]) for c in range(values.shape[1])]
    return float(np.mean([area for area in found if area is not None]))


def labelwise_auc(truth: ArrayLike, scores: ArrayLike) -> tuple[float | None, list[float | None]]:
    """The areas of several labels, and their mean over the labels that have one.

    Args:
        truth: (n, labels) 1 or 0; NaN where a row's label is not known.
        scores: (n, labels).
    """
    known, values = np.asarray(truth, np.float64), np.asarray(scores, np.float64)
    found = []
    for column in range(known.shape[1]):
        rows = ~np.isnan(known[:, column])
        found.append(auc(known[rows, column], values[rows, column]))
    defined = [area for area in found if area is not None]
    return (float(np.mean(defined)) if defined else None), found


def delong(labels: ArrayLike, scores: Sequence[ArrayLike]) -> tuple[Array, Array]:
    """The areas (k,) of k scores of the same rows, and their covariance matrix (k, k).

    Args:
        labels: (n,) 1 or 0, two of each at least.
        scores: k arrays (n,).

    Raises:
        ValueError: with fewer than two positives or negatives, whose variance is not defined.
    """
    truth = np.asarray(labels) > 0
    m, n = int(truth.sum()), int((~truth).sum())
    if m < 2 or n < 2:
        raise ValueError(f"DeLong's variance needs two positives and two negatives, not {m} and {n}")
    v10, v01 = np.empty((len(scores), m)), np.empty((len(scores), n))
    for k, each in enumerate(scores):
        values = np.asarray(each, np.float64)
        positives, negatives = values[truth], values[~truth]
        together = rankdata(np.concatenate([positives, negatives]))
        v10[k] = (together[:m] - rankdata(positives)) / n
        v01[k] = 1 - (together[m:] - rankdata(negatives)) / m
    covariance = np.cov(v10) / m + np.cov(v01) / n
    return v10.mean(1), np.atleast_2d(covariance)


def delong_interval(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float] | None:
    """The 95 % interval of the area, cut to [0, 1]; None where the variance is not defined, or 0 (perfect ranking)."""
    try:
        [area], [[variance]] = delong(labels, [scores])
    except ValueError:
        return None
    if variance <= 0:
        return None
    half = _Z95 * float(np.sqrt(variance))
    return max(0.0, float(area) - half), min(1.0, float(area) + half)


@dataclass(frozen=True)
class Paired:
    """The areas of two scores of the same rows, and DeLong's test of their being equal."""

    first: float
    second: float
    difference: float
    """Second minus first."""
    interval: tuple[float, float] | None
    """95 %, of the difference."""
    z: float | None
    p: float | None
    """Two-sided; None where the variance of the difference is 0."""


def paired_delong(labels: ArrayLike, first: ArrayLike, second: ArrayLike) -> Paired:
    """Compare two scores (n,) of the same rows; `ValueError` as in `delong`."""
    (a, b), covariance = delong(labels, [first, second])
    difference = float(b - a)
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    # What is left of equal scores is rounding.
    if variance <= 1e-15 * max(1e-300, float(covariance[0, 0] + covariance[1, 1])):
        return Paired(float(a), float(b), difference, None, None, None)
    deviation = float(np.sqrt(variance))
    z = difference / deviation
    half = _Z95 * deviation
    return Paired(float(a), float(b), difference, (difference - half, difference + half), z, float(2 * norm.sf(abs(z))))
