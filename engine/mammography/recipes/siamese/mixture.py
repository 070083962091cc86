"""Soft labels: the probability that a pair of patches differs, given its distance.

A mixture of two Gaussians is fitted to all distances; the label is the posterior of the component with the larger
mean. With unequal variances that posterior is not monotone in the tails; beyond its extremum it is kept constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.mixture import GaussianMixture

from ....errors import GigamorphError
from .config import SiameseConfig

Array = NDArray[np.float64]
Rule = Literal["gmm", "exp", "rank", "hard"]
_FLOOR = 1e-6  # minimal variance of a component, relative to that of all distances, to prevent spikes


@dataclass(frozen=True)
class Mixture:
    """Two Gaussians; [1] is that of pairs that differ."""

    means: tuple[float, float]
    deviations: tuple[float, float]
    share: float
    """Share of the pairs that differ."""

    @property
    def separated(self) -> bool:
        """Whether the means differ by more than one (pooled) standard deviation."""
        pooled = np.sqrt((self.deviations[0] ** 2 + self.deviations[1] ** 2) / 2)
        return bool(self.means[1] - self.means[0] > pooled)

    def posterior(self, distances: ArrayLike) -> Array:
        """Return P(differs) for distances (n,), which never decreases with the distance."""
        d = np.asarray(distances, np.float64)
        # The log-odds are quadratic in d, with one extremum: below the smaller mean if the other component is wider,
        # otherwise above the larger mean.
        (low, high), (a, b) = self.means, (0.5 / deviation**2 for deviation in self.deviations)
        if a != b:
            turn = (a * low - b * high) / (a - b)
            d = np.minimum(d, turn) if a < b else np.maximum(d, turn)
        odds = self._log_odds(d)
        return 1 / (1 + np.exp(-np.clip(odds, -500, 500)))

    def _log_odds(self, d: Array) -> Array:
        terms = [
            -0.5 * ((d - mean) / deviation) ** 2 - np.log(deviation)
            for mean, deviation in zip(self.means, self.deviations, strict=True)
        ]
        return terms[1] - terms[0] + np.log(self.share) - np.log1p(-self.share)


def fit_mixture(distances: ArrayLike, *, least: float = 0.01, most: float = 0.2) -> Mixture:
    """Fit by expectation-maximisation on distances (n,), initialised at their median and 95 % quantile.

    Args:
        least, most: bounds on the share of pairs that differ.
    """
    d = np.asarray(distances, np.float64)
    if len(d) < 4 or not np.isfinite(d).all():
        raise GigamorphError(f"{len(d)} distances are too few or not all finite; add more pairs")
    spread = max(float(d.var()), 1e-12)
    start = np.quantile(d, [0.5, 0.95])[:, None]
    model = GaussianMixture(
        2, means_init=start, weights_init=[0.9, 0.1], reg_covar=_FLOOR * spread, max_iter=500, tol=1e-6, random_state=0
    ).fit(d[:, None])
    means, variances = np.asarray(model.means_)[:, 0], np.asarray(model.covariances_)[:, 0, 0]
    first, second = np.argsort(means)
    share = float(np.clip(np.asarray(model.weights_)[second], least, most))
    deviations = np.sqrt(variances)
    return Mixture(
        (float(means[first]), float(means[second])), (float(deviations[first]), float(deviations[second])), share
    )


def soft_labels(distances: ArrayLike, rule: Rule, mixture: Mixture, among: ArrayLike | None = None) -> Array:
    """Return labels (n,) from 0 (alike) to 1 (different) for distances (n,).

    gmm: the mixture's posterior. hard: 1 if it is above 1/2. exp: 1 - exp(-D^2 / s^2), s the mixture's larger mean.
    rank: the share of smaller distances, to the power of 1 / share of the mixture, so that few are near 1.

    Args:
        among: the distances among which rank is computed; by default `distances`.
    """
    d = np.asarray(distances, np.float64)
    if rule == "gmm":
        return mixture.posterior(d)
    if rule == "hard":
        return (mixture.posterior(d) > 0.5).astype(np.float64)
    if rule == "exp":
        return 1 - np.exp(-((d / max(mixture.means[1], 1e-12)) ** 2))
    others = d if among is None else np.asarray(among, np.float64)
    ranks = np.minimum(np.searchsorted(np.sort(others), d) / max(len(others) - 1, 1), 1)
    return ranks ** (1 / mixture.share)


@dataclass(frozen=True)
class Judge:
    """The distances (n,) of the training pairs, their mixture, and the rule for labels."""

    distances: Array
    mixture: Mixture
    rule: Rule

    @classmethod
    def fit(cls, distances: ArrayLike, config: SiameseConfig) -> Judge:
        """Fit the mixture of the distances of all training pairs."""
        d = np.asarray(distances, np.float64)
        return cls(d, fit_mixture(d, least=config.least_share, most=config.most_share), config.labels)

    def labels(self, distances: ArrayLike) -> Array:
        """Return soft labels of distances, of these pairs or others; zeros while the mixture is not separated."""
        d = np.asarray(distances, np.float64)
        if not self.mixture.separated:
            return np.zeros(len(d))
        return soft_labels(d, self.rule, self.mixture, self.distances)
