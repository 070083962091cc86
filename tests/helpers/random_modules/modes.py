"""Gradient modes, detach, branches on what wants a gradient, hooks that a forward registers on tensors."""

from __future__ import annotations

import copy
import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .piece import Piece, conv


class NoGradStem(Piece):
    """A part of the network without gradients, by one of the ways to say so."""

    weight = 3

    def make(self, width: int, dice: random.Random) -> None:
        self.conv = nn.Sequential(conv(width, dice), nn.BatchNorm2d(width) if dice.random() < 0.3 else nn.ReLU())
        self.how = dice.choice(["with", "decorator", "set", "context", "training", "inner", "switch"])

    @torch.no_grad()
    def decorated(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "decorator":
            return self.decorated(x)
        if self.how == "switch":  # as a function call, not as a context
            before = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
            y = self.conv(x)
            torch.set_grad_enabled(before)
            return y
        if self.how == "inner":
            with torch.no_grad():
                y = self.conv(x)
                with torch.enable_grad():
                    return y + self.conv(x)
        context = {
            "with": torch.no_grad,
            "set": lambda: torch.set_grad_enabled(False),
            "context": lambda: torch.autograd.set_grad_enabled(False),
            "training": lambda: torch.set_grad_enabled(not self.training and torch.is_grad_enabled()),
        }[self.how]()
        with context:
            return self.conv(x)


class NoGradGate(Piece):
    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.fc, self.pooled = nn.Conv2d(width, width, 1), dice.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.fc(x.mean((2, 3), keepdim=True) if self.pooled else x).sigmoid()
        return x * gate


class SubtractedMean(Piece):
    """A mean of the image that is taken for a constant."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.how, self.conv = dice.choice(["no_grad", "detach", "data", "std"]), conv(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                mean = x.mean((0, 2, 3), keepdim=True)
        elif self.how == "detach":
            mean = x.mean((2, 3), keepdim=True).detach()
        elif self.how == "data":
            mean = x.data.mean((2, 3), keepdim=True)
        else:
            with torch.no_grad():
                mean = x.var((2, 3), keepdim=True).sqrt()
        return self.conv(x - mean)


class NormalizedWeight(Piece):
    """A weight whose norm is taken for a constant."""

    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.how = conv(width), dice.choice(["no_grad", "detach", "data", "gradient"])

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        if self.how == "no_grad":
            with torch.no_grad():
                norm = weight.flatten(1).norm(dim=1)[:, None, None, None]
        else:
            source = {"detach": weight.detach(), "data": weight.data, "gradient": weight}[self.how]
            norm = source.flatten(1).norm(dim=1)[:, None, None, None]
        return F.conv2d(x, weight / (norm + 1e-3), self.conv.bias, padding=1)


class Detach(Piece):
    weight = 2

    def make(self, width: int, dice: random.Random) -> None:
        self.how, self.conv = dice.choice(["half", "all", "skip", "detach_", "round", "sign"]), conv(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "half":
            a, b = y[:, :1], y[:, 1:]
            return torch.cat([a.detach(), b], 1)
        if self.how == "detach_":
            return x + y.mul(2).detach_()
        if self.how == "round":  # straight through
            return y + (y.round() - y).detach()
        if self.how == "sign":
            return y.sign().detach() - y.tanh().detach() + y.tanh()
        return {"all": y.detach(), "skip": x.detach() + y}[self.how]


class DetachedParameter(Piece):
    """A parameter that is used, and never gets a gradient."""

    def make(self, width: int, dice: random.Random) -> None:
        self.scale = nn.Parameter(torch.rand(width, 1, 1) + 0.5)
        self.how = dice.choice(["detach", "data", "no_grad", "clone"])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                scale = self.scale * 2
            return x * scale
        scale = {"detach": self.scale.detach(), "data": self.scale.data, "clone": self.scale.clone().detach()}
        return x * scale[self.how]


class Branch(Piece):
    """Another computation where gradients are wanted, or not, or in training."""

    weight = 3

    def make(self, width: int, dice: random.Random) -> None:
        self.conv = conv(width)
        self.how = dice.choice(["grad mode", "x wants", "weight wants", "training", "leaf", "grad_fn"])

    def forward(self, x: Tensor) -> Tensor:
        wanted = {
            "grad mode": torch.is_grad_enabled(),
            "x wants": x.requires_grad,
            "weight wants": self.conv.weight.requires_grad,
            "training": self.training,
            "leaf": x.is_leaf,
            "grad_fn": x.grad_fn is not None,
        }[self.how]
        return self.conv(x).relu() if wanted else self.conv(x) * 0.5


class Teacher(Piece):
    """A moving average of the layer's weights, without gradients, that may be updated in the forward."""

    def make(self, width: int, dice: random.Random) -> None:
        self.student = conv(width)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.moves = dice.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.moves and self.training:
            with torch.no_grad():
                for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    old.mul_(0.9).add_(new, alpha=0.1)
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x) - 0.5 * target


class TensorHook(Piece):
    """A hook that the forward registers on one of its tensors."""

    weight = 1.5

    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.how = conv(width), dice.choice(["map", "pooled", "retain", "collect"])
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        pooled = y.mean((2, 3), keepdim=True)
        if y.requires_grad:
            if self.how == "map":
                y.register_hook(lambda grad: grad * 0.5)
            elif self.how == "pooled":
                pooled.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
            elif self.how == "retain":
                y.retain_grad()
            else:
                pooled.register_hook(lambda grad: self.seen.append(round(grad.sum().item(), 6)))
        return y + pooled


class InferenceInside(Piece):
    """A gate under inference_mode, used as a constant."""

    weight = 0.5

    def make(self, width: int, dice: random.Random) -> None:
        self.fc = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            gate = self.fc(x.mean((2, 3), keepdim=True)).sigmoid()
        return x + gate.clone()


class RequiresGradInside(Piece):
    """A forward that turns the gradients of its own parameters off."""

    weight = 0.5

    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.how = conv(width), dice.choice(["off", "eval"])

    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.requires_grad_(self.how == "eval" and not self.training)
        return self.conv(x)
