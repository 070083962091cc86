"""BYOL (Grill et al., arXiv 2006.07733): a network predicts its slow copy's projection of another view.

L = |p / |p| - z / |z||^2 = 2 - 2 <p, z> / (|p| |z|)                  eq. 2; both orders of the views are added
theta <- optimizer(theta, grad L)                                     eq. 3; the online network, with its predictor
xi <- tau xi + (1 - tau) theta                                        eq. 4; the target
tau = 1 - (1 - tau_0) (cos(pi k / K) + 1) / 2                         at step k of K
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import SiameseConfig
from .network import Embedding, at_least_float32
from .two_views import Projected, TwoViews


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """Return eq. 2, averaged over predictions p of targets z (n, dim), which get no gradient."""
    p, z = at_least_float32(p), at_least_float32(z).detach()
    return (2 - 2 * F.cosine_similarity(p, z, dim=1)).mean()


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Apply eq. 4 to parameters; each network keeps its own running statistics."""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, 1 - tau)


def tau_at(step: int, steps: int, base: float) -> float:
    """Return the target's momentum, which rises from `base` at the first step to 1 at the end."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


class BYOLTask(TwoViews):
    """BYOL training of an embedding's encoder, which is the online network's.

    The target is updated at the beginning of a step, after the previous optimizer step. It is part of the checkpoint,
    as is the number of steps.
    """

    trainable = ("online", "predictor")

    def __init__(
        self, embedding: Embedding, pairs: Sequence[Any] | Tensor, config: SiameseConfig, device: str = "cpu"
    ) -> None:
        super().__init__(pairs, config, device)
        self.projected = Projected(embedding.maps, _mlp(embedding.project.in_features, config))
        self.target, self.predictor = copy.deepcopy(self.projected), _mlp(config.dim, config)
        self.module = nn.ModuleDict({"online": self.projected, "target": self.target, "predictor": self.predictor})
        self.step, self.steps = 0, config.epochs * -(-len(pairs) // (config.batch_size * config.accumulate))

    def loss(self, batch: Sequence[int]) -> Tensor:
        if self.step:
            update_target(self.target, self.projected, tau_at(self.step - 1, self.steps, self.config.momentum))
        self.step += 1
        views = self.views(batch)
        predicted = self.predictor(self.projected(views))
        with torch.no_grad():
            # Swap the halves, because the target is the other view.
            wanted = self.target(views).roll(len(batch), 0)
        return 2 * byol_loss(predicted, wanted)

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def _mlp(width: int, config: SiameseConfig) -> nn.Sequential:
    """Build a projector or predictor as published: linear, BatchNorm, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(width, config.hidden), nn.BatchNorm1d(config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.dim)
    )
