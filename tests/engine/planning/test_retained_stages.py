"""A network of several stages keeps graphs of tiles too, as far as its budget goes, and stays exact."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate, plan
from gigamorph.engine.planning.simulate import StorageMeter
from gigamorph.engine.tiling import memory_limit
from gigamorph.engine.tiling.arena import arena
from gigamorph.engine.tiling.arena_limit import ArenaLimit
from gigamorph.engine.tiling.memory_limit import MemoryLimit
from gigamorph.engine.tiling.record import Recorded


class Squeezed(nn.Module):
    """Live norms, a skip connection, squeeze-and-excite: five stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(True))
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(6), nn.SiLU(True))
        self.gate = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Sigmoid())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        x = x + y * self.gate(y.mean((2, 3), keepdim=True))
        return self.head(x.mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Squeezed()).double().train()


IMAGE = torch.randn(2, 2, 61, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0])
def test_stages_retain_what_the_budget_holds(share: float) -> None:
    net, shape = network(), tuple(IMAGE.shape)
    least = plan(net, shape, tile=16, dtype=torch.float64)
    most = plan(net, shape, 2**34, tile=16, dtype=torch.float64)
    assert len(most.retained_tiles) == len(most.sides) > 2 and not any(least.retained_tiles)
    budget = int(most.peak_bytes - (1 - share) * most.retained_bytes)
    chosen = plan(net, shape, budget, tile=16, dtype=torch.float64)
    assert chosen.peak_bytes <= budget and (0 < chosen.retained < most.retained or share == 1)
    assert most.work <= chosen.work < least.work
    assert_exact(net, IMAGE, tile=16, memory_budget=budget + 4 * IMAGE.nbytes)  # it wants a gradient there


def test_graphs_that_have_to_go_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every watch finds the limit exceeded: graphs go one after the other, and the gradients stay those of stock."""
    dropped: list[int] = []

    def watch(self: MemoryLimit, new: int | None = None) -> None:
        dropped.append(self._drop())

    for kind in (MemoryLimit, ArenaLimit):
        monkeypatch.setattr(kind, "watch", watch)
    assert_exact(network(), IMAGE, tile=16, memory_budget="2GiB")
    assert sum(dropped) > 5


@pytest.mark.usefixtures("no_arena")
def test_a_process_near_its_limit_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on pages of their own from the first op on, the heap trimmed all the time; then it is as it was."""
    alone: list[bool] = []
    make = memory_limit.new_blocks_on_own_pages
    monkeypatch.setattr(memory_limit, "new_blocks_on_own_pages", lambda on: (alone.append(on), make(on)))
    monkeypatch.setattr(memory_limit, "resident_bytes", lambda: 2**50 + len(alone))
    monkeypatch.setattr(memory_limit, "_OP_SHARE", 2**40)
    assert_exact(network(), IMAGE, tile=16, memory_budget="2GiB")
    assert alone and alone[0] and not alone[-1]


def test_an_arena_without_room_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op finds the limit exceeded: free pages go back at each, and all graphs."""
    if arena() is None:
        pytest.skip("no arena")
    began: list[ArenaLimit] = []
    init = ArenaLimit.__init__

    def late(self: ArenaLimit, *args: Any) -> None:
        init(self, *args)
        self.bytes -= 2**34
        began.append(self)

    monkeypatch.setattr(ArenaLimit, "__init__", late)
    assert_exact(network(), IMAGE, tile=16, memory_budget="2GiB")
    assert any(limit.dropped for limit in began)


@pytest.mark.parametrize("tile", [16, (16, 80)])
def test_a_forward_that_is_dropped_leaves_no_graphs(
    tile: int | tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, as a limit that drops them counts on: neither autograd's nodes nor a tile lead to what holds them."""
    graphs: list[weakref.ref[Recorded]] = []
    init = Recorded.__init__

    def noted(self: Recorded, *args: Any, **more: Any) -> None:
        graphs.append(weakref.ref(self))
        init(self, *args, **more)

    monkeypatch.setattr(Recorded, "__init__", noted)
    result = accelerate(network(), tile=tile, memory_budget="2GiB")(IMAGE)
    assert any(graph() is not None for graph in graphs)
    gc.disable()
    try:
        del result
        assert all(graph() is None for graph in graphs)
    finally:
        gc.enable()


class Narrowing(nn.Module):
    """The first stage at full resolution is the heaviest; behind each gate a stage at half the resolution begins."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(nn.Conv2d(n, 16, 3, 2, 1) for n in (24, 16, 16))
        self.gates = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in self.bodies)
        self.stem, self.head = nn.Sequential(nn.Conv2d(2, 24, 3, padding=1), nn.GELU()), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for body, gate in zip(self.bodies, self.gates, strict=True):
            y = F.gelu(body(x))
            x = y * gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_tensors_of_a_step_are_those_predicted(share: float) -> None:
    """Where the graphs of late stages are at their most, the tile in work is one of theirs, not the heaviest."""
    torch.manual_seed(0)
    net, image = Narrowing().double(), torch.randn(1, 2, 192, 160, dtype=torch.float64)
    most = plan(net, tuple(image.shape), 2**34, tile=32, dtype=torch.float64)
    budget = int(most.peak_bytes - (1 - share) * most.retained_bytes)
    made = plan(net, tuple(image.shape), budget, tile=32, dtype=torch.float64)
    fast = accelerate(net, tile=32, memory_budget=budget)
    fast(image).sum().backward()  # gradients, and what is kept from step to step
    with StorageMeter() as meter:
        meter.ignore(image, net.state_dict(), [p.grad for p in net.parameters()])
        fast(image).sum().backward()
    parameters = 2 * sum(p.nbytes for p in net.parameters())
    besides = made.library_bytes + made.heap_bytes + made.record_bytes + parameters
    predicted = made.peak_bytes - besides
    assert made.retained and predicted == pytest.approx(meter.peak, rel=0.1)
