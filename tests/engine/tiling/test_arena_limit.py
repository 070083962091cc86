"""The limit of a step whose blocks come from the arena: free pages go first, then graphs."""

from __future__ import annotations

import pytest

from gigamorph.engine.tiling import arena_limit as module
from gigamorph.engine.tiling import memory_limit
from gigamorph.engine.tiling.arena import Counts
from gigamorph.engine.tiling.arena_limit import ArenaLimit


class Process:
    """A process whose use of memory is told, as its arena: 1000 bytes, 300 of which are held by the step."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.besides, self.in_use, self.spare, self.rooms, self.trims = 1000, 0, 0, list[int](), 0
        for one in (module, memory_limit):
            patch.setattr(one, "resident_bytes", lambda: self.besides + self.in_use + self.spare)
            patch.setattr(one, "trim_heap", self.trim)
        patch.setattr(memory_limit, "_baseline", memory_limit.ProcessBaseline())

    def trim(self) -> None:
        self.trims += 1

    def limit(self, predicted: int = 500, strict: bool = True, calls: int = 0, mapped: int = 0) -> ArenaLimit:
        given = 500, 300, 0, 100, strict, predicted, self
        made = ArenaLimit(*given, calls=calls, mapped=mapped)  # pyright: ignore[reportArgumentType]
        self.rooms.clear()
        self.trims = 0
        return made

    def counts(self) -> Counts:
        return Counts(self.in_use, self.in_use + self.spare, 0)

    def room(self, bytes: int) -> None:
        self.rooms.append(bytes)
        self.spare -= min(self.spare, max(0, -bytes))  # as the arena does

    def no_limit(self) -> None:
        self.rooms.append(2**60)


class Graphs:
    def __init__(self, process: Process, each: int) -> None:
        self.recorded = {(0, n): Graph(process, each) for n in range(3)}


class Graph:
    def __init__(self, process: Process, bytes: int) -> None:
        self.process, self.bytes = process, bytes

    def __del__(self) -> None:
        self.process.in_use -= self.bytes
        self.process.spare += self.bytes


def test_free_pages_are_no_use_and_go_back_where_they_exceed(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch)
    limit = process.limit()  # to 1200 in all
    process.in_use, process.spare = 0, 190
    limit.keep()
    assert process.rooms == [10] and not limit.near  # there is room for a piece of 100 and one more
    process.in_use, process.spare = 90, 80
    limit.keep()
    assert process.rooms.pop() == 30 and limit.near
    process.in_use, process.spare = 90, 150
    limit.keep()
    assert process.rooms[1:] == [-40] and process.spare == 110
    process.in_use = 101
    limit.watch(40)
    assert process.trims == 0 and process.rooms[2:] == [-11]


def test_graphs_go_where_what_is_in_use_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of them than must, those that are needed last; the heap is trimmed before, once in a pass."""
    process = Process(monkeypatch)
    limit = process.limit()
    graphs = Graphs(process, 30)
    limit.may_drop(graphs)
    process.in_use = 201  # the graphs among it
    limit.watch()
    assert process.trims == 1 and list(graphs.recorded) == [(0, 1), (0, 2)]
    assert process.in_use == 171 and process.rooms == [-1]
    limit.watch(59)  # what an op will make counts before it is made
    assert process.trims == 1 and list(graphs.recorded) == [(0, 2)]
    limit.must_keep(graphs)
    process.in_use = 900
    limit.watch()
    assert len(graphs.recorded) == 1 and limit.dropped == 2


def test_there_is_room_for_the_gradients_that_come_after_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit stays in force after a pass: the gradient of a map is made before the pass that fills it."""
    process = Process(monkeypatch)
    limit = process.limit()
    process.in_use, process.spare = 20, 100
    with limit.watched():
        pass
    limit.must_keep(Graphs(process, 0))
    with limit.watched():
        pass
    assert process.rooms == [80, 80, 80, -220] and process.spare == 0  # the step holds 300 bytes of weights


def test_there_is_room_for_calls_that_autograd_differentiates_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch)
    limit = process.limit(calls=150)
    process.in_use, process.spare = 20, 100
    with limit.watched():
        assert process.rooms == [80]
    assert process.rooms == [80, -70] and process.spare == 30


def test_there_is_room_for_maps_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pages come within an op, where nobody looks: a step of a U-Net took a sixth more than its budget."""
    process, files = Process(monkeypatch), [700]
    monkeypatch.setattr(module, "mapped_bytes", lambda: files[0])
    limit = process.limit(mapped=60)
    process.in_use, process.spare = 100, 80
    limit.watch()
    process.besides, files[0] = 1040, 740
    limit.watch()
    assert process.rooms == [-40, 0] and process.spare == 40


def test_what_calls_free_goes_back_until_the_last_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    process, own_pages = Process(monkeypatch), list[bool]()
    monkeypatch.setattr(module, "new_blocks_on_own_pages", own_pages.append)
    limit, graphs = process.limit(calls=150), Graphs(process, 0)
    limit.may_drop(graphs)
    with limit.watched():
        assert own_pages == [False]
    limit.must_keep(graphs)
    with limit.watched():
        assert own_pages == [False, True, False]
    assert own_pages[3:] == [False]


@pytest.mark.parametrize(("predicted", "room"), [(400, 0), (490, 80)])
def test_what_is_predicted_is_kept_to_with_little_besides(
    predicted: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(monkeypatch)
    limit = process.limit(predicted)
    process.in_use, process.spare = 100, 20  # beside 300 that are held
    limit.watch(10)
    limit.keep()
    assert process.rooms == [room, room]


def test_a_limit_that_is_not_strict_leaves_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch)
    limit = process.limit(strict=False)
    process.in_use = 5000
    limit.keep()
    limit.watch(100)
    assert set(process.rooms) == {2**60} and process.trims == 0 and limit.near
