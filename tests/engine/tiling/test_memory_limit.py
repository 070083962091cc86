"""What nothing uses goes back to the system only where a step would not fit otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.lowering.ops import Local
from gigamorph.engine.tiling import memory_limit as module
from gigamorph.engine.tiling.arena_limit import ArenaLimit
from gigamorph.engine.tiling.memory_limit import MemoryLimit
from gigamorph.engine.tiling.tile import Tile


class Graphs:
    """Of three tiles."""

    def __init__(self) -> None:
        self.recorded = {(0, n): object() for n in range(3)}


class Machine:
    """A process whose use of memory is told."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.used, self.trimmed = 1000, []
        patch.setattr(module, "resident_bytes", lambda: self.used)
        patch.setattr(module, "trim_heap", lambda: self.trimmed.append(self.used))
        patch.setattr(module, "_baseline", module.ProcessBaseline())


def test_the_heap_goes_back_only_where_the_next_tile_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile finds room in what earlier ones have freed: it is taken to add what the last one has, 70 at most."""
    machine = Machine(monkeypatch)
    memory_limit = MemoryLimit(500, held=300, left=0, work=100, strict=True)  # to 1200 in all
    near = []
    for machine.used in (1000, 1031, 1140, 1190, 1195, 1201, 1050):
        memory_limit.keep()
        near.append(memory_limit.near)
    assert machine.trimmed == [1000, 1140, 1190, 1201]
    assert near == [False, True, True, True, True, True, True]
    assert memory_limit.has_room(150) and not memory_limit.has_room(151)


def test_a_ceiling_that_is_not_strict_leaves_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    memory_limit = MemoryLimit(500, held=300, left=0, work=100, strict=False)
    machine.used = 5000
    memory_limit.keep()
    assert not machine.trimmed and memory_limit.near and memory_limit.has_room(1 << 40)


def test_near_the_limit_the_heap_grows_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks get pages of their own there, and only there; after the pass the heap is as it was."""
    machine = Machine(monkeypatch)
    alone: list[bool] = []
    monkeypatch.setattr(module, "new_blocks_on_own_pages", alone.append)
    limit = MemoryLimit(500, held=300, left=0, work=100, strict=True)  # to 1200, of which an op adds 25
    with limit.watched():
        for machine.used in (1000, 1175, 1176, 1190, 1175, 1176):
            limit.watch()
        assert alone == [True, False, True]
        assert machine.trimmed == [1000, 1176, 1190]  # not again until the heap has got something to give back
    assert alone == [True, False, True, False]


def test_before_an_op_there_is_room_for_what_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    limit = MemoryLimit(500, held=300, left=0, work=100, strict=True)  # to 1200 in all
    machine.trimmed.clear()
    with limit.watched():
        for machine.used, new in ((1190, 10), (1000, 200), (1001, 200), (900, 250)):
            limit.watch(new)
    assert machine.trimmed == [1001]


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_tells_what_each_op_makes(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs at least, and its window where that is put together; nothing of what is written in place."""
    told: list[int | None] = []
    made: list[int] = []
    run = Tile.run

    def measured(tile: Tile, local: Local) -> tuple[torch.Tensor, ...]:
        result = run(tile, local)
        if not result[0].is_meta and local.op.outputs[0] not in tile.tiled.in_place:  # the plan's have no values
            made.append(sum(t.nbytes for t in result))
            assert told[-1] is not None and told[-1] >= made[-1]
        return result

    monkeypatch.setattr(Tile, "run", measured)
    for kind in (MemoryLimit, ArenaLimit):
        monkeypatch.setattr(kind, "watch", lambda self, new=None: told.append(new))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 5), nn.MaxPool2d(2))
    with torch.set_grad_enabled(training):
        result = accelerate(net, memory_budget="64MiB", tile=16)(torch.randn(1, 1, 50, 50)).sum()
    if training:
        result.backward()
    assert len(made) > 50 and any(new is not None and new > most for new, most in zip(told, made, strict=False))


def test_graphs_go_where_what_is_in_use_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the backward needs last first, no more of them than must, and none of a backward that has begun."""
    machine = Machine(monkeypatch)
    limit = MemoryLimit(500, held=300, left=0, work=100, strict=True)
    first, second = Graphs(), Graphs()
    limit.may_drop(first)
    limit.may_drop(second)
    in_use = lambda: 1100 + 30 * (len(first.recorded) + len(second.recorded))  # noqa: E731
    monkeypatch.setattr(module, "trim_heap", lambda: setattr(machine, "used", in_use()))
    machine.used = 1300
    limit.watch()
    assert not first.recorded and list(second.recorded) == [(0, 0), (0, 1), (0, 2)]
    assert limit.dropped == 3 and machine.used == 1190
    limit.must_keep(second)
    machine.used = 1300
    monkeypatch.setattr(module, "trim_heap", lambda: None)
    limit.watch()
    assert len(second.recorded) == 3


@pytest.mark.usefixtures("no_arena")
def test_a_tile_that_was_asked_for_without_a_budget_leaves_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is predicted that could be kept to; giving the heap back after each op takes most of a step's time."""
    given_back = []
    monkeypatch.setattr(module, "trim_heap", lambda: given_back.append(1))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).train()
    accelerate(net, tile=16)(torch.randn(1, 1, 50, 50)).sum().backward()
    assert given_back == []


def test_forwards_whose_backward_comes_together_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, graphs = Machine(monkeypatch), [Graphs(), Graphs()]
    limit = MemoryLimit(500, held=300, left=0, work=100, strict=True)  # to 1200 in all
    limit.may_drop(graphs[0])
    machine.used = 1190  # of the first forward
    limit.share(600, work=50, strict=True)
    limit.may_drop(graphs[1])
    assert limit.bytes == 1300 and limit.work == 100
    machine.used = 1305
    limit.watch()  # graphs of the first, which are needed last, go first
    assert [len(one.recorded) for one in graphs] == [0, 0] and limit.dropped == 6
    limits = []
    monkeypatch.setattr(MemoryLimit, "share", lambda self, *given: limits.append(self))
    net = accelerate(nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1)), memory_budget="64MiB")
    net([torch.randn(1, 50, 50), torch.randn(1, 60, 40), torch.randn(1, 40, 40)]).sum().backward()
    assert len(limits) == 2 and limits[0] is limits[1]


def test_the_heap_stays_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes back before the first three, where something else has come or another network runs, and now and then."""
    machine, live, trimmed = Machine(monkeypatch), 1000, []
    limits: list[int] = []
    for number in range(40):
        live += 11 * (number == 10)
        machine.used += 11 * (number == 10)

        def give_back(number: int = number, live: int = live) -> None:
            trimmed.append(number)
            machine.used = live

        monkeypatch.setattr(module, "trim_heap", give_back)
        limit = MemoryLimit(500, 310 if number == 20 else 300, 0, work=100, strict=True)
        with limit.watched():
            machine.used = live + 50  # what is freed, and stays in the heap
        limits.append(limit.bytes)
    assert trimmed == [0, 1, 2, 10, 20, 21, 22, 23]
    assert limits == [1200] * 10 + [1211] * 10 + [1201] + [1211] * 19


def test_what_else_goes_between_steps_is_not_the_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    limits = []
    for machine.used in (1000, 1000, 1000, 700, 1000):  # of which 300 are held
        limits.append(MemoryLimit(2000, held=300, left=0, work=100, strict=True))
        module._baseline.after = machine.used + 400
    assert [limit.bytes for limit in limits] == [2700, 2700, 2700, 2400, 2400]


def test_what_libraries_keep_of_a_step_stays_within_the_limit_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels and copies of weights, up to what was predicted; what comes besides is not the step's."""
    machine = Machine(monkeypatch)
    limits = []
    for machine.used in (1000, 1060, 1060, 1300, 900, 1000):
        limits.append(MemoryLimit(2000, held=300, left=80, work=100, strict=True))
        module._baseline.after = machine.used - 60
    assert [limit.bytes for limit in limits] == [2700, 2700, 2700, 2920, 2600, 2620]


@pytest.mark.usefixtures("no_arena")
def test_a_weight_that_is_read_folded_and_as_it_is_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    init = MemoryLimit.__init__
    monkeypatch.setattr(MemoryLimit, "__init__", lambda self, *given: (held.append(given[1]), init(self, *given))[1])
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    with torch.no_grad():
        accelerate(net, memory_budget="64MiB", tile=16)(torch.randn(1, 16, 50, 50))
    state = [t for name, t in net.state_dict().items() if "num_batches" not in name]
    assert held == [sum(t.nbytes for t in state)]


def test_gradients_of_steps_before_are_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that add to gradients, and the ones between that have none, have the same room."""
    machine = Machine(monkeypatch)
    ends = []
    for gradients in (0, 60, 60, 60, 0, 60):
        machine.used = 1000 + gradients
        limit = MemoryLimit(500, held=300, left=0, work=100, strict=True, gradients=gradients)
        ends.append(limit.bytes)
        module._baseline.after = machine.used
    assert ends == [1200] * 6
    assert len(machine.trimmed) == 3  # gradients that come and go are no reason to look again


def test_a_step_tells_its_limit_of_gradients_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(
        module.ProcessBaseline, "before", lambda self, limit, held, gradients, *_: told.append(gradients) or 0
    )
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1))
    fast = accelerate(net, memory_budget="60MiB")
    for _ in range(2):
        fast(torch.rand(1, 1, 64, 64)).sum().backward()
    own = sum(p.nbytes for p in net.parameters())
    assert told == [0, own]
