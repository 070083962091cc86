"""Heads, and the containers in which a network returns what they give."""

from __future__ import annotations

import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS: dict[str, type[nn.Module]] = {}


def head(name: str, weight: float = 1) -> Callable[[type], type]:
    """Registers a head: called with the last map and all maps."""

    def register(cls: type) -> type:
        cls.weight = weight
        HEADS[name] = cls
        return cls

    return register


@head("vector", 5)
class Vector(nn.Module):
    def __init__(self, width: int, dice: random.Random):
        super().__init__()
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        return self.fc(x.mean((2, 3)))


@head("map", 4)
class Map(nn.Module):
    def __init__(self, width: int, dice: random.Random):
        super().__init__()
        self.conv = nn.Conv2d(width, dice.randint(1, 3), dice.choice([1, 3]))

    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        return self.conv(x) if min(x.shape[-2:]) > 2 else x


@head("pyramid", 1)
class Pyramid(nn.Module):
    def __init__(self, width: int, dice: random.Random):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in range(2))

    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        return [one(m) for one, m in zip(self.heads, maps, strict=False)]


@head("log_softmax", 1)
class LogSoftmax(Vector):
    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        return F.log_softmax(self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), -1)


@head("deep vector", 1)
class Deep(nn.Module):
    """Norms and in-place operations on vectors."""

    def __init__(self, width: int, dice: random.Random):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(width, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        y = self.norm(self.first(x.amax((2, 3))))
        y += 1
        return self.last(y.relu_())


@head("raw", 1)
class Raw(nn.Module):
    """What it was given, untouched."""

    def __init__(self, width: int, dice: random.Random):
        super().__init__()

    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        return x


@head("detached", 0.5)
class Detached(Vector):
    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        result = super().forward(x, maps)
        return [result, result.detach()]


@head("index", 0.5)
class Index(Vector):
    """Integers beside the scores."""

    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        result = super().forward(x, maps)
        return [result, result.argmax(1), result > 0]


@head("scalar", 0.5)
class Scalar(nn.Module):
    def __init__(self, width: int, dice: random.Random):
        super().__init__()

    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        return x.square().mean()


@head("view", 0.5)
class View(Vector):
    """Views of one tensor."""

    def forward(self, x: Tensor, maps: list[Tensor]) -> Any:
        result = super().forward(x, maps)
        return [result[:, 0], result.t()]


@dataclass
class Result:
    logits: Any
    extra: Any = None
    note: str = "as is"


Pair = namedtuple("Pair", "first rest")


class ModelOutput(OrderedDict):
    """As Hugging Face's: keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Rows(list):
    """A list with a method."""


class Plain:
    """An object of no known kind."""

    def __init__(self, values: Any):
        self.values = values


CONTAINERS: dict[str, Callable[[list[Any], Tensor], Any]] = {
    "tensor": lambda found, image: found[0] if len(found) == 1 else tuple(found),
    "tuple": lambda found, image: tuple(found),
    "list": lambda found, image: list(found),
    "dict": lambda found, image: {f"out{n}": one for n, one in enumerate(found)},
    "ordered": lambda found, image: OrderedDict((f"out{n}", one) for n, one in enumerate(found)),
    "model output": lambda found, image: ModelOutput((f"out{n}", one) for n, one in enumerate(found)),
    "rows": lambda found, image: Rows(found),
    "dataclass": lambda found, image: Result(found[0], found[1:]),
    "namespace": lambda found, image: SimpleNamespace(logits=found[0], rest=found[1:]),
    "named tuple": lambda found, image: Pair(found[0], found[1:]),
    "object": lambda found, image: Plain(found),
    "nested": lambda found, image: {"a": [found[0], {"b": (found, None)}], "none": None},
    "with numbers": lambda found, image: (found, 3, 0.5, "name", True, image.shape[0]),
    "with sizes": lambda found, image: {"out": found, "size": image.shape, "dtype": image.dtype},
    "with image": lambda found, image: (found[0], image),
    "twice": lambda found, image: (found[0], found[0]),
    "with constant": lambda found, image: [found[0], torch.arange(3.0), torch.ones(2, dtype=torch.float64)],
    "int keys": lambda found, image: dict(enumerate(found)),
}
