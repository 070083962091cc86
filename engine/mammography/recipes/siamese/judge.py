"""Soft labels from a network's distances, by the mixture of the distances of its training pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .config import SiameseConfig
from .mixture import Array, Mixture, Rule, fit_mixture, soft_labels


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
