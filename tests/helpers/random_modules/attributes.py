"""Attributes that a forward reads, and that a user may change between two steps."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .piece import Piece, conv, ramp

SETTING = {"scale": 1.5}


class Temperature(Piece):
    weight = 2
    knobs: ClassVar = {"temperature": (1.0, 2.0, 0.5)}

    def make(self, width: int, dice: random.Random) -> None:
        self.temperature = dice.choice([1.0, 2])

    def forward(self, x: Tensor) -> Tensor:
        return x / self.temperature


class Flag(Piece):
    weight = 2
    knobs: ClassVar = {"flag": (True, False), "slope": (0.1, 0.3), "kind": ("relu", "tanh")}

    def make(self, width: int, dice: random.Random) -> None:
        self.flag, self.slope, self.kind = dice.random() < 0.5, 0.2, "relu"

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(x, self.slope) if self.flag else x
        return x.relu() if self.kind == "relu" else x.tanh()


class PlainTensor(Piece):
    """Tensors that are no buffers."""

    weight = 3
    knobs: ClassVar = {"scale": (ramp(1), 2 * ramp(1))}

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice(["one", "list", "dict", "tuple", "trained", "inplace"])
        self.scale = ramp(1) + 2
        self.several = [ramp(width, 1, 1), ramp(1)]
        self.named = {"a": ramp(width, 1, 1), "b": {"c": ramp(1)}}
        self.pair = (ramp(1), ramp(width, 1, 1))
        self.trained = ramp(width, 1, 1).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "list":
            return x * self.several[0] + self.several[1]
        if self.how == "dict":
            return x * self.named["a"] + self.named["b"]["c"]
        if self.how == "tuple":
            return x * self.pair[0] + self.pair[1]
        if self.how == "trained":
            return x * self.trained
        return x * self.scale


class Options(Piece):
    """Options in a dictionary, a namespace, a class attribute or a global."""

    weight = 2
    factor = 1.5
    knobs: ClassVar = {"factor": (1.5, 2.0)}

    def make(self, width: int, dice: random.Random) -> None:
        self.how = dice.choice(["dict", "namespace", "class", "global", "property"])
        self.options: dict[str, Any] = {"factor": 1.5, "acts": ["relu"]}
        self.space = SimpleNamespace(factor=1.25, inner=SimpleNamespace(act="relu"))

    @property
    def doubled(self) -> float:
        return 2 * self.factor

    def forward(self, x: Tensor) -> Tensor:
        factor = {
            "dict": self.options["factor"],
            "namespace": self.space.factor,
            "class": self.factor,
            "global": SETTING["scale"],
            "property": self.doubled,
        }[self.how]
        act = self.options["acts"][-1] if self.how == "dict" else self.space.inner.act
        return getattr(torch, act)(x * factor)


class Act(Piece):
    """A function in an attribute."""

    knobs: ClassVar = {"act": (torch.relu, torch.tanh, F.gelu)}

    def make(self, width: int, dice: random.Random) -> None:
        self.act = dice.choice([torch.relu, F.silu, lambda x: x * 0.5])

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class SizeAttribute(Piece):
    knobs: ClassVar = {"size": ((9, 11), (12, 8))}

    def make(self, width: int, dice: random.Random) -> None:
        self.size = (10, 10)
        self.mode = dice.choice(["nearest", "bilinear"])

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=self.size, mode=self.mode)


class HiddenModule(Piece):
    """Modules in a plain list: not among `modules()`, and their parameters not among `parameters()`."""

    def make(self, width: int, dice: random.Random) -> None:
        self.hidden = [conv(width).double().requires_grad_(dice.random() < 0.5)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


class Tied(Piece):
    """One weight under two names."""

    def make(self, width: int, dice: random.Random) -> None:
        self.first, self.second = conv(width), conv(width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Helper(Piece):
    """Helpers outside the module, and methods of its own."""

    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.how = conv(width), dice.choice(["function", "static", "forward of another", "call"])

    @staticmethod
    def halved(x: Tensor) -> Tensor:
        return x * 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "function":
            return _scaled(self.conv(x))
        if self.how == "static":
            return self.halved(self.conv(x))
        if self.how == "call":
            return nn.Module.__call__(self.conv, x)
        return self.conv.forward(x)  # its hooks do not run


def _scaled(x: Tensor, by: float = 0.3) -> Tensor:
    return x * by
