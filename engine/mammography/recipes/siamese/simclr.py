"""SimCLR (Chen et al., arXiv 2002.05709): identify a patch's other view among all views of the batch.

l(i, j) = -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t))      eq. 1; s the cosine of two projections
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import SiameseConfig
from .network import Embedding, at_least_float32, without_autocast
from .two_views import Projected, TwoViews


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """Return eq. 1, averaged over both orders of all pairs of views a, b (n, dim)."""
    z = F.normalize(at_least_float32(torch.cat([a, b])), dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    with without_autocast(z):
        logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))


class SimCLRTask(TwoViews):
    """Trains an embedding's encoder with `nt_xent` on projections of its features by a head of two linear layers."""

    def __init__(
        self, embedding: Embedding, pairs: Sequence[Any] | Tensor, config: SiameseConfig, device: str = "cpu"
    ) -> None:
        super().__init__(pairs, config, device)
        width = embedding.project.in_features
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.dim))
        self.module = self.projected = Projected(embedding.maps, head)

    def loss(self, batch: Sequence[int]) -> Tensor:
        first, second = self.projected(self.views(batch)).chunk(2)
        return nt_xent(first, second, self.config.temperature)
