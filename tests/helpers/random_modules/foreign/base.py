"""The base of the foreign pieces."""

from __future__ import annotations

import contextlib
import inspect
import random
from typing import Any, ClassVar

from torch import Tensor, nn

from ..piece import PIECES, Piece, conv

VALUES = (1.5, 0.5, 2.5)  # of a setting: at first, and before the visits 1 and 2
_RESERVED = {"make", "setup", "forward", "change", "fit", "around", "run", "train"}


class Foreign(Piece, drawn=False):
    """A convolution followed by one kind of Python code; each public method of a subclass is a variation of it.

    Attributes:
        variations: their names, where they are not the public methods.
    """

    weight = 0  # `draw` never takes these pieces; `draw_foreign` does
    variations: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, drawn: bool = True) -> None:
        assert cls.__name__ not in PIECES, f"two pieces are called {cls.__name__}"
        assert cls.weight == 0, f"a variation of {cls.__name__} hides an attribute of pieces"
        super().__init_subclass__(drawn)

    def make(self, width: int, dice: random.Random) -> None:
        self.conv, self.how = conv(width), dice.choice(variations(type(self)))
        self.setup(width, dice)

    def setup(self, width: int, dice: random.Random) -> None:
        """More layers and attributes."""

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.how)(self.conv(x))

    def change(self, net: nn.Module, number: int) -> None:
        """What the user does before visit `number`, 1 or 2.

        Args:
            net: what the user calls: the plain network, or the result of `accelerate`.
        """

    def fit(self, net: nn.Module) -> None:
        """What is done to the plain network before anything else."""

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the network is called."""
        return contextlib.nullcontext()


class Edited(Foreign, drawn=False):
    """A fixed forward; each public method of a subclass is a change that the user makes between two calls."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.factor = VALUES[0]

    def run(self, y: Tensor) -> Tensor:
        return y * self.factor

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.conv(x))

    def change(self, net: nn.Module, number: int) -> None:
        getattr(self, self.how)(net, number)


def variations(kind: type[Foreign]) -> tuple[str, ...]:
    """The variations of a kind of piece, in a fixed order."""
    if kind.variations:
        return kind.variations
    found = {name for name, value in vars(kind).items() if inspect.isfunction(value) and name[0] != "_"}
    return tuple(sorted(found - _RESERVED))
