"""Log-odds: scores with the ranking of probabilities, which are not rounded to 0 or 1.

For class c with logits l, p_c = softmax(l)_c and z_c = l_c - log sum_{k != c} exp(l_k) = log(p_c / (1 - p_c)); the
probability is sigmoid(z_c). In float64 p is 1 for z above 37, where z still distinguishes images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit, logit, logsumexp

Array = NDArray[np.float64]


def of_logits(logits: ArrayLike) -> Array:
    """Log-odds float64 (..., classes) of each class against all others, from logits of the same shape.

    A single output is the logit of a sigmoid, which equals its log-odds.
    """
    values = np.asarray(logits, np.float64)
    classes = values.shape[-1]
    if classes == 1:
        return values.copy()
    if classes == 2:  # equal, and faster
        return values - values[..., ::-1]
    others = [np.delete(values, c, axis=-1) for c in range(classes)]
    return np.stack([values[..., c] - logsumexp(others[c], axis=-1) for c in range(classes)], -1)


def of_probabilities(probabilities: ArrayLike) -> Array:
    """log(p / (1 - p)), float64; infinite for 0 and 1."""
    return np.asarray(logit(np.asarray(probabilities, np.float64)))


def probabilities(log_odds: ArrayLike) -> Array:
    """The inverse of `of_probabilities`."""
    return np.asarray(expit(np.asarray(log_odds, np.float64)))


def mean(log_odds: Array) -> Array:
    """Log-odds (...) of the mean probability along the first axis of (n, ...), without rounding probabilities."""
    with np.errstate(invalid="ignore"):  # inf - inf if all are certain
        found = logsumexp(log_expit(log_odds), axis=0) - logsumexp(log_expit(-log_odds), axis=0)
    return np.asarray(np.where(np.isnan(found), log_odds.max(0), found))


def means(log_odds: Array, starts: NDArray[np.int64]) -> Array:
    """`mean` of each group of rows (n, ...); groups start at `starts` (groups,) and are not empty."""
    if not len(log_odds):
        return log_odds
    sizes = np.diff(np.append(starts, len(log_odds)))

    def log_sums(values: Array) -> Array:
        highest = np.maximum.reduceat(values, starts, axis=0)
        highest = np.where(np.isfinite(highest), highest, 0.0)  # if all are -inf, so is their sum
        return np.log(np.add.reduceat(np.exp(values - np.repeat(highest, sizes, axis=0)), starts, axis=0)) + highest

    with np.errstate(divide="ignore"):  # log 0
        return log_sums(log_expit(log_odds)) - log_sums(log_expit(-log_odds))
