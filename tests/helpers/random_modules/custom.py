"""Custom autograd functions, checkpoints, autocast, functional calls, weights made by the network itself."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .piece import Piece, conv


class _Reverse(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -ctx.scale * grad, None


class _Square(torch.autograd.Function):
    """Saves tensors; its gradient is twice what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 4 * x * grad


class CustomFunction(Piece):
    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice(["pooled", "pooled square", "map", "weight"])
        self.conv = conv(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "map":
            return _Reverse.apply(self.conv(x), 0.5)
        if self.how == "weight":
            return F.conv2d(x, _Square.apply(self.conv.weight), self.conv.bias, padding=1)
        y = self.conv(x)
        pooled = y.mean((2, 3), keepdim=True)
        return y + (_Square.apply(pooled) if self.how == "pooled square" else _Reverse.apply(pooled, 2.0))


class Checkpoint(Piece):
    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.conv = nn.Sequential(conv(width), nn.BatchNorm2d(width) if dice.random() < 0.3 else nn.Tanh())
        self.fc = nn.Conv2d(width, width, 1)
        self.how, self.reentrant = dice.choice(["map", "map", "vector"]), dice.random() < 0.3

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "map":
            return checkpoint(self.conv, x, use_reentrant=self.reentrant)
        y = self.conv(x)
        return y * checkpoint(self.fc, y.mean((2, 3), keepdim=True), use_reentrant=self.reentrant).sigmoid()


class AutocastRegion(Piece):
    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.on = conv(width), dice.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            return self.conv(x)


class FunctionalCall(Piece):
    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.scale = conv(width), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        weights = {"weight": self.conv.weight * self.scale, "bias": self.conv.bias}
        return torch.func.functional_call(self.conv, weights, (x,))


class DynamicConv(Piece):
    """A kernel of its own for each image, made of the pooled map."""

    def make(self, width: int, dice: random.Random) -> None:
        self.make_kernel = nn.Linear(width, width * 9)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernel = self.make_kernel(x.mean((2, 3))).tanh().reshape(n * c, 1, 3, 3)
        return F.conv2d(x.reshape(1, n * c, h, w), kernel, padding=1, groups=n * c).reshape(n, c, h, w)


class Mixture(Piece):
    """Kernels mixed by a gate of the batch."""

    def make(self, width: int, dice: random.Random) -> None:
        self.kernels = nn.Parameter(torch.randn(3, width, width, 3, 3) * 0.2)
        self.gate = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean((0, 2, 3))).softmax(0)
        return F.conv2d(x, torch.einsum("k,koihw->oihw", gate, self.kernels), padding=1)


class PrivateAttributes(Piece):
    """Reads of tensors that only Python makes."""

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice(["new_zeros", "new", "zeros_like", "type_as", "isinstance", "shape", "to", "T", "item"])
        self.register_buffer("bias", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        if self.how == "new_zeros":
            return torch.cat([x[:, 1:], x.new_zeros(x.shape[0], 1, *x.shape[2:]) + 0.5], 1)
        if self.how == "new":
            return x + x.new([1.0, 2.0]).sum()
        if self.how == "zeros_like":
            return torch.maximum(x, torch.zeros_like(x))
        if self.how == "type_as":
            return x + torch.arange(c).type_as(x)[:, None, None]
        if self.how == "isinstance":
            return x.relu() if type(x) is torch.Tensor else x
        if self.how == "shape":
            return x * (x.shape[-1] / x.size(-2)) + x.dim()
        if self.how == "to":
            return x + torch.arange(c)[:, None, None].to(x)
        if self.how == "item":
            return x + self.bias.item()
        return x + x.mean((2, 3)).T.mT.sum(1)[:, None, None, None]
