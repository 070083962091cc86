"""What stays in memory, and what is recorded again, where each image has another size."""

from __future__ import annotations

import collections
import copy
import copyreg
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recordings import recordings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from gigamorph import accelerate
from gigamorph.engine.capture import graph
from gigamorph.engine.tiling.arena import arena


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def step(net: nn.Module, height: int, width: int) -> None:
    net(torch.rand(1, 1, height, width)).sum().backward()


def test_what_a_step_has_left_is_given_back_before_the_next_size_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records and plans came beside it: the memory exceeded its budget by half."""
    found = arena()
    if found is None:
        pytest.skip("no arena")
    net, left, program = accelerate(network()), [], graph.Graph.program

    def noted(*args: Any, **kwargs: Any) -> Any:
        left.append(found.counts().spare)
        return program(*args, **kwargs)

    monkeypatch.setattr(graph.Graph, "program", noted)
    step(net, 500, 500)
    assert found.counts().spare > 10 << 20
    step(net, 510, 500)
    assert len(left) == 2 and left[1] == 0


def test_the_plan_of_a_size_does_not_depend_on_those_before_it() -> None:
    """A run that goes on after a kill has not seen them, and has to be the same bit for bit."""
    plans = []
    for sizes in ((500, 520, 640, 480, 600), (600,)):
        net = accelerate(network(), memory_budget="24MiB")
        for size in sizes:
            step(net, size, 500)
        plans.append(list(net._runner.programs)[-1].plan)
    assert plans[0] == plans[1] and plans[0].tiles[0] > 1


def test_shapes_that_pytorch_remembers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_CACHED_SHAPES", 60)
    net, sizes = accelerate(network(), tile=16), []
    FakeTensorMode.cache_clear()
    for number in range(12):
        step(net, 40 + number, 40)
        sizes.append(len(FakeTensorMode.cache))
    assert max(sizes) < 60 + sizes[0] < sum(sizes)
    assert any(after < before for before, after in itertools.pairwise(sizes))


class Keeping(nn.Module):
    """Keeps its map, in three places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)
        self.kept: Any = None
        self.named: dict[str, Any] = {}
        self.listed: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.kept, self.named["map"], self.listed = y, y, [y]
        return self.second(y.relu()).mean((2, 3))


class Reading(Keeping):
    """Adds the map that the last call kept, if it has the same size."""

    def forward(self, x: Tensor) -> Tensor:
        old = self.kept
        y = self.first(x)
        self.kept = y if old is None or old.shape != y.shape else y + old.detach()
        return self.second(self.kept.relu()).mean((2, 3))


SIZES = ((40, 33), (45, 33), (40, 33), (40, 33), (37, 41), (45, 33), (40, 33))


@pytest.mark.parametrize("kind", [Keeping, Reading])
def test_a_map_that_the_network_keeps_is_freed_by_the_next_call(kind: type[Keeping]) -> None:
    """A recording kept the map of the call before it for good."""
    net, kept = accelerate(kind(), tile=16), []
    for height, width in SIZES:
        step(net, height, width)
        kept.append(weakref.ref(net.kept))
    gc.collect()
    assert [map_() is not None for map_ in kept] == [False] * (len(SIZES) - 1) + [True]


@pytest.mark.parametrize("kind", [Keeping, Reading])
def test_kept_maps_of_other_sizes(kind: type[Keeping]) -> None:
    """They had the network recorded again wherever the size changed, though no call looks at them."""
    net = kind().double()
    nets, counts = (net, accelerate(copy.deepcopy(net), tile=16)), []
    with recordings() as made:
        for height, width in SIZES:
            x = torch.randn(1, 1, height, width, dtype=torch.float64)
            stock, ours = (one(x) for one in nets)
            assert torch.allclose(stock, ours, rtol=1e-12, atol=1e-12)
            counts.append(len(made))
    if kind is Keeping:  # again where the height changes for the first time, and where the width does
        assert counts == [1, 2, 2, 2, 3, 3, 3]


class KeepsSize(nn.Module):
    """Keeps the size of its image, and says in another attribute what it has computed for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.size, self.task, self.done = nn.Conv2d(1, 2, 3), None, "first", None

    def forward(self, x: Tensor) -> Tensor:
        self.size, self.done = x.shape[2:], (self.task, x.shape[2])
        return self.layer(x).mean((2, 3))


def test_values_that_come_again() -> None:
    """Recorded once for each; not by turns at every call."""
    net, counts = accelerate(KeepsSize(), tile=16), []
    with recordings() as made:
        for number in range(14):
            net.task, size = ("first", "second")[number % 2], (40, 45)[number // 2 % 2]
            step(net, size, 33)
            assert (net.size, net.done) == ((size, 33), (net.task, size))
            counts.append(len(made))
    assert counts[6:] == [counts[6]] * 8, counts


class Annotated(nn.Module):
    """A class with what Python adds to it when its objects are copied, and when its annotations are read."""

    scale: float

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Conv2d(1, 2, 3), Table()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((2, 3)) * self.table.factor


class Table:
    factor = 2.0


def test_a_copy_of_the_network_does_not_have_it_recorded_again() -> None:
    net = accelerate(Annotated(), tile=16)
    with recordings() as made:
        step(net, 40, 33)
        for kind in (Annotated, Table, Tensor, nn.Module):
            copyreg._slotnames(kind)  # pyright: ignore[reportAttributeAccessIssue]
            assert kind.__annotations__ is not None
        copy.deepcopy(net)
        step(net, 40, 33)
    assert len(made) == 1


GIVEN: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "tensor": (lambda: torch.ones(1), lambda given: given),
    "tensor in a tuple": (lambda: (torch.ones(1),), lambda given: given[0]),
    "array": (lambda: np.ones(1), lambda given: given),
    "layer": (lambda: nn.Linear(2, 2), lambda given: given),
    "layer's weight": (lambda: nn.Sequential(nn.Linear(2, 2)), lambda given: given[0].weight),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_recordings_keep_nothing_that_the_network_has_no_longer(kind: str) -> None:
    make, get = GIVEN[kind]
    net, given = accelerate(KeepsSize(), tile=16), []
    for number in range(5):
        net.target, net.task = make(), str(number)
        given.append(weakref.ref(get(net.target)))
        step(net, 40, 33)
    gc.collect()
    assert [one() is not None for one in given] == [False] * 4 + [True]


RESULTS: dict[str, tuple[Any, Any]] = {
    "int and float": (lambda y: {"map": y, "share": 1}, lambda y: {"map": y, "share": 1.0}),
    "int and bool": (lambda y: (y, 1), lambda y: (y, True)),
    "sign of zero": (lambda y: (y, 0.0), lambda y: (y, -0.0)),
    "order of a dict": (lambda y: {"map": y, "share": 1}, lambda y: {"share": 1, "map": y}),
    "kinds of dicts": (lambda y: {"map": y}, lambda y: collections.OrderedDict(map=y)),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_that_are_equal_but_not_the_same(kind: str) -> None:
    """The recording of the second was taken for that of the first, which the network went on returning."""

    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.way = nn.Conv2d(1, 2, 3), 0

        def forward(self, x: Tensor) -> Any:
            return RESULTS[kind][self.way](self.layer(x))

    def described(result: Any) -> str:
        parts = list(result.items() if isinstance(result, dict) else result)
        return repr((type(result), tree_map(lambda leaf: "map" if isinstance(leaf, Tensor) else leaf, parts)))

    stock = Returning()
    net, x = accelerate(copy.deepcopy(stock), tile=16), torch.rand(1, 1, 40, 36)
    for way in (0, 1, 0, 1):
        stock.way = net.way = way
        assert described(net(x)) == described(stock(x))
