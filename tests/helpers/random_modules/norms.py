"""BatchNorms used in other ways than once per step."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .piece import Piece, conv


def _norm(width: int, dice: random.Random) -> nn.BatchNorm2d:
    momentum = dice.choice([0.1, 0.3, None])
    return nn.BatchNorm2d(width, momentum=momentum, affine=dice.random() < 0.8, track_running_stats=dice.random() < 0.9)


class SharedNorm(Piece):
    """One norm, called several times in some order."""

    weight = 3

    def make(self, width: int, dice: random.Random) -> None:
        self.norm, self.conv = _norm(width, dice), conv(width)
        self.how = dice.choice(["reversed", "twice", "chain", "scales", "branch"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "reversed":
            b, a = (self.norm(m) for m in (y, x))
            return a + b
        if self.how == "twice":
            return self.norm(x) + self.norm(y).relu()
        if self.how == "chain":
            return self.norm(self.conv(self.norm(x)))
        if self.how == "branch":
            return self.norm(x.flip(1)) if self.training else self.norm(x)
        if min(x.shape[-2:]) < 4:
            return self.norm(x)
        small = self.norm(F.avg_pool2d(y, 2))
        return self.norm(y) + small.mean((2, 3), keepdim=True)


class UnusedNorm(Piece):
    """A norm whose result is not used, or hardly."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.norm, self.how = _norm(width, dice), dice.choice(["dropped", "no_grad", "zero", "detached"])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                y = self.norm(x)
            return x + y
        y = self.norm(x)
        return {"dropped": x, "zero": x + 0 * y, "detached": x + y.detach()}[self.how]


class GhostNorm(Piece):
    """Each part of the batch, or of the map, has statistics of its own."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.norm, self.how = nn.BatchNorm2d(width), dice.choice(["chunks", "loop", "view", "channels"])
        if self.how == "channels":
            self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "chunks":
            return torch.cat([self.norm(part) for part in x.chunk(2)])
        if self.how == "loop":
            return torch.stack([self.norm(one[None])[0] for one in x])
        if self.how == "channels":
            n, c, h, w = x.shape
            return self.norm(x.reshape(n * c, 1, h, w)).reshape(n, c, h, w)
        n, c, h, w = x.shape
        mean, var = self.norm.running_mean, self.norm.running_var
        if not self.training or n % 2:
            return self.norm(x)
        y = F.batch_norm(x.reshape(n // 2, 2 * c, h, w), mean.repeat(2), var.repeat(2), training=True)
        return y.reshape(n, c, h, w)


class FrozenNorm(Piece):
    """Stays in evaluation mode, by one of the usual ways."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.norm, self.how = _norm(width, dice), dice.choice(["train", "forward", "momentum"])

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if self.how == "train":
            self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "forward":
            self.norm.eval()
        if self.how == "momentum" and self.norm.momentum is not None:
            self.norm.momentum = max(0.01, self.norm.momentum * 0.5)
        return self.norm(x)


class OtherNorms(Piece):
    """Norms on vectors, on rows of pixels, and of several dimensions."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice(["vector", "pixels", "3d", "1d"])
        make = {"vector": nn.BatchNorm1d, "pixels": nn.BatchNorm1d, "3d": nn.BatchNorm3d, "1d": nn.BatchNorm1d}
        self.norm = make[self.how](width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.how == "vector":
            return x + self.norm(x.mean((2, 3))).tanh()[:, :, None, None] if n > 2 else x
        if self.how == "pixels":
            return self.norm(x.permute(0, 2, 3, 1).reshape(-1, c)).reshape(n, h, w, c).permute(0, 3, 1, 2)
        if self.how == "3d":
            return self.norm(x[:, :, None])[:, :, 0]
        return self.norm(x.flatten(2)).unflatten(2, (h, w))


class WeightStandard(Piece):
    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.norm = conv(width), nn.GroupNorm(1, width)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self.norm(F.conv2d(x, weight, self.conv.bias, padding=1))
