"""The base of all pieces: modules from a map to a map of as many channels."""

from __future__ import annotations

import inspect
import random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PIECES: dict[str, type[Piece]] = {}


class Piece(nn.Module):
    """A module from a map (N, C, H, W) to a map with C channels; every subclass is drawn by its name.

    Attributes:
        weight: how often it is drawn, beside others.
        knobs: attributes that a user may set between two steps, and the values that they take.
    """

    weight: ClassVar[float] = 1
    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def __init__(self, width: int, dice: random.Random):
        super().__init__()
        self.make(width, dice)

    def __init_subclass__(cls, drawn: bool = True) -> None:
        super().__init_subclass__()
        if drawn:
            PIECES[cls.__name__] = cls

    def make(self, width: int, dice: random.Random) -> None:
        """Layers and options; `dice` draws the options."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Ways(Piece, drawn=False):
    """A convolution, and after it a method of the subclass, drawn by its name: each public one is a way."""

    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.calls, self.kept, self.other = conv(width), 0, None, None
        ways = {name for name, value in vars(type(self)).items() if inspect.isfunction(value) and name[0] != "_"}
        self.how = dice.choice(sorted(ways - {"make"}))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return getattr(self, self.how)(self.conv(x))


def conv(width: int, dice: random.Random | None = None, out: int | None = None) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size, or with `dice` one of any kind that nearly does."""
    if dice is None:
        return nn.Conv2d(width, out or width, 3, padding=1)
    kernel = dice.choice([1, 2, 3, 3, 3, 5])
    dilation = dice.choice([1, 1, 1, 2])
    return nn.Conv2d(
        width,
        out or width,
        kernel,
        stride=dice.choice([1, 1, 1, 2]),
        padding=dice.randint(0, dilation * (kernel - 1) // 2 + 1),
        dilation=dilation,
        groups=dice.choice([1, 1, 1, width]) if out in (None, width) else 1,
        bias=dice.random() < 0.7,
        padding_mode=dice.choice(["zeros"] * 6 + ["replicate"]),
    )


def ramp(*shape: int) -> Tensor:
    """Fixed numbers between -0.8 and 1.2, one of them alone not 0; float64, and nothing is drawn."""
    count = torch.Size(shape).numel()
    return torch.linspace(-0.8, 1.2, count + 2, dtype=torch.float64)[1:-1].reshape(shape)
