"""What nothing uses goes back to the system only where a step would not fit otherwise."""

from __future__ import annotations

import pytest

from gigamorph.engine.tiling import memory_limit as module
from gigamorph.engine.tiling.memory_limit import MemoryLimit
from gigamorph.engine.tiling.page_pool import PagePool, Pages


class Machine:
    """A process whose use of memory is told."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.used, self.trimmed = 1000, []
        patch.setattr(module, "used_bytes", lambda: self.used)
        patch.setattr(module, "return_free_pages", lambda: self.trimmed.append(self.used))


def test_the_heap_goes_back_only_where_the_next_tile_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    memory_limit = MemoryLimit(
        500, held=300, work=100, page_pool=PagePool(), strict=True
    )  # to 1200 in all, of which a tile adds 70
    near = []
    for machine.used in (1000, 1031, 1100, 1130, 1131, 1050):
        memory_limit.keep()
        near.append(memory_limit.near)
    assert machine.trimmed == [1000, 1131]
    assert near == [False, True, True, True, True, True]


def test_a_ceiling_that_is_not_strict_leaves_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    memory_limit = MemoryLimit(500, held=300, work=100, page_pool=PagePool(), strict=False)
    machine.used = 5000
    memory_limit.keep()
    assert not machine.trimmed and memory_limit.near


def test_spare_pages_go_first_and_no_more_of_them_than_must(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, page_pool = Machine(monkeypatch), PagePool()
    page_pool.pages = [Pages.make(size, on_disk=False) for size in (200, 100, 50)]
    memory_limit = MemoryLimit(
        500, held=300, work=100, page_pool=page_pool, strict=True
    )  # 350 of the 1000 are spare: to 850 in all
    assert memory_limit.bytes == 1000 - 350 - 300 + 500 - 70
    machine.trimmed.clear()
    machine.used = memory_limit.bytes + 1
    memory_limit.keep()
    assert page_pool.bytes == 150  # the oldest went
    machine.used = memory_limit.bytes + 120
    memory_limit.keep()
    assert page_pool.bytes == 0
    assert machine.trimmed == [
        memory_limit.bytes + 1,
        memory_limit.bytes + 120,
    ]  # the machine of this test has got no room by it
