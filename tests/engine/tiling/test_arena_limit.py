"""The limit of a step whose blocks come from the arena: free pages go first, then those of maps, then graphs."""

from __future__ import annotations

import pytest

from gigamorph.engine.tiling import arena_limit as module
from gigamorph.engine.tiling import memory_limit
from gigamorph.engine.tiling.arena import Counts
from gigamorph.engine.tiling.arena_limit import ArenaLimit
from gigamorph.engine.tiling.page_pool import PagePool, Pages


class Process:
    """A process whose use of memory is told, as its arena: 1000 bytes, 300 of which are held by the step."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.besides, self.in_use, self.spare, self.rooms, self.trims = 1000, 0, 0, list[int](), 0
        for one in (module, memory_limit):
            patch.setattr(one, "used_bytes", lambda: self.besides + self.in_use + self.spare)
            patch.setattr(one, "trim_heap", self.trim)
        patch.setattr(memory_limit, "_besides", memory_limit.Besides())

    def trim(self) -> None:
        self.trims += 1

    def limit(self, limit: int = 500, page_pool: PagePool | None = None) -> ArenaLimit:
        made = ArenaLimit(limit, 300, 0, work=100, page_pool=page_pool or PagePool(), strict=True, arena=self)  # pyright: ignore[reportArgumentType]
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
    with limit.watched():
        pass
    assert process.rooms[-1] == 2**60


def test_pages_of_maps_that_are_gone_go_before_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the graphs no more than must: those that are needed last."""
    process, page_pool = Process(monkeypatch), PagePool()
    limit = process.limit(page_pool=page_pool)
    page_pool.pages = [Pages.make(50, on_disk=False), Pages.make(20, on_disk=False)]
    graphs = Graphs(process, 30)
    limit.may_drop(graphs)
    process.in_use = 201  # the graphs among it
    limit.watch()
    assert page_pool.bytes == 20 and process.trims == 1 and list(graphs.recorded) == [(0, 1), (0, 2)]
    assert process.in_use == 171 and process.rooms == [-1]
    limit.watch(59)  # what an op will make counts before it is made
    assert page_pool.bytes == 0 and process.trims == 1 and list(graphs.recorded) == [(0, 2)]
    limit.must_keep(graphs)
    process.in_use = 900
    limit.watch()
    assert len(graphs.recorded) == 1 and limit.dropped == 2


def test_a_limit_that_is_not_strict_leaves_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch)
    limit = process.limit()
    limit.strict = False
    process.in_use = 5000
    limit.keep()
    limit.watch(100)
    assert process.rooms == [] and process.trims == 0 and limit.near
