"""What a forward did not find, and finds later: TorchDynamo by itself notices none of these."""

import functools
import os

import pytest
import torch
from torch import Tensor, nn

from gigamorph import accelerate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.table: dict[str, float] = {}

    def factor(self) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) * self.factor()


class Attribute(Net):
    def factor(self) -> float:
        try:
            return self.scale
        except AttributeError:
            return 3.0

    def add(self) -> None:
        self.scale = 5.0


class OfTheClass(Net):
    def factor(self) -> float:
        try:
            return OfTheClass.scale
        except AttributeError:
            return 3.0

    def add(self) -> None:
        OfTheClass.scale = 5.0


class Item(Net):
    def factor(self) -> float:
        try:
            return self.table["scale"]
        except KeyError:
            return 3.0

    def add(self) -> None:
        self.table["scale"] = 5.0


class OwnDict(Net):
    def factor(self) -> float:
        return self.__dict__.get("scale", 3.0)

    def add(self) -> None:
        self.scale = 5.0


class Got(dict):
    __getattr__ = dict.get


class ItsItems(dict):
    def __init__(self, **items: float) -> None:
        super().__init__(**items)
        self.__dict__ = self


class ItemsByGet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.config = Got(base=1.0)

    def factor(self) -> float:
        return self.config.base * (self.config.scale or 3.0)  # pyright: ignore[reportAttributeAccessIssue]

    def add(self) -> None:
        self.config["scale"] = 5.0


class ItemsOfItself(Net):
    def __init__(self) -> None:
        super().__init__()
        self.config = ItsItems(base=1.0)

    def factor(self) -> float:
        return self.config.base * getattr(self.config, "scale", 3.0)  # pyright: ignore[reportAttributeAccessIssue]

    def add(self) -> None:
        self.config.base, self.config.scale = 2.0, 5.0  # pyright: ignore[reportAttributeAccessIssue]


class Cached(Net):
    @functools.cached_property
    def scale(self) -> float:
        return 3.0 + len(self.table)

    def factor(self) -> float:
        return self.scale

    def add(self) -> None:
        self.__dict__.pop("scale", None)
        self.table["a"] = 1.0


class Environment(Net):
    def factor(self) -> float:
        return float(os.getenv("GIGAMORPH_TEST_SCALE", "3"))

    def add(self) -> None:
        os.environ["GIGAMORPH_TEST_SCALE"] = "5"


@pytest.mark.parametrize("kind", [Attribute, OfTheClass, Item, OwnDict, ItemsByGet, ItemsOfItself, Cached, Environment])
def test_what_was_missing_is_found_later(kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIGAMORPH_TEST_SCALE", "3")
    monkeypatch.delenv("GIGAMORPH_TEST_SCALE")
    model, x = kind(), torch.randn(1, 1, 20, 20)
    net = accelerate(model, tile=8)
    for _ in range(2):
        assert torch.allclose(net(x), model(x), atol=1e-6)
        model.add()
