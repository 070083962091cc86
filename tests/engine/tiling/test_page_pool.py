"""The pages of maps that are gone serve the next ones."""

from __future__ import annotations

import copy
import gc
import mmap
import os
import pickle
import sys

import pytest
import torch
from exactness import randomize, step, step_errors
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.tiling import stored_maps as maps_module
from gigamorph.engine.tiling.memory import used_bytes
from gigamorph.engine.tiling.page_pool import PagePool
from gigamorph.engine.tiling.stored_maps import let_rows_go, new_map

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("no_arena")  # with an arena its blocks serve; see test_arena.py
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages do not go back")


def a_map(page_pool: PagePool, size: int = MIB, zero: bool = False) -> torch.Tensor:
    return new_map(torch.empty(0, 0, 0, 0), (1, 1, size // 4096, 1024), zero=zero, page_pool=page_pool)


def test_pages_of_a_dead_map_serve_the_next() -> None:
    page_pool = PagePool()
    first = a_map(page_pool)
    place = first.data_ptr()
    view = first[:, :, 2:5]
    del first
    assert not page_pool.pages  # a view still reads them
    del view
    assert page_pool.bytes == MIB
    assert a_map(page_pool).data_ptr() == place
    other, more = a_map(page_pool), a_map(page_pool)
    assert other.data_ptr() != more.data_ptr()


def test_zeros_where_zeros_are_asked_for() -> None:
    page_pool = PagePool()
    a_map(page_pool).fill_(torch.nan)
    assert a_map(page_pool).isnan().all()  # nothing is cleared that need not be
    again = a_map(page_pool, zero=True)
    assert not again.any()


def test_pages_are_not_taken_for_far_smaller_maps() -> None:
    page_pool = PagePool()
    del (big := [a_map(page_pool, 8 * MIB), a_map(page_pool, 2 * MIB)])[:]
    assert not big and page_pool.bytes == 10 * MIB
    vector = a_map(page_pool, MIB)
    assert page_pool.bytes == 8 * MIB
    del vector
    a_map(page_pool, 3 * MIB)
    assert page_pool.bytes == 13 * MIB  # pages that did not fit are still there


@linux
def test_pages_of_which_rows_went_back_do_not_wait() -> None:
    page_pool = PagePool()
    let_rows_go(a_map(page_pool), (2, 3), 1)
    assert not page_pool.pages


@linux
def test_shrinking_gives_the_memory_back() -> None:
    page_pool = PagePool()
    a_map(page_pool, 64 * MIB).fill_(1)
    before = used_bytes()
    page_pool.shrink(64 * MIB)
    assert page_pool.bytes == 64 * MIB
    page_pool.shrink(64 * MIB - 1)
    assert page_pool.bytes == 0
    assert before - used_bytes() > 60 * MIB


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.booleans()), max_size=20))
def test_maps_that_live_together_never_share_memory(moves: list[tuple[bool, int, bool]]) -> None:
    page_pool, live = PagePool(), {}
    for number, (dies, size, zero) in enumerate(moves):
        if dies and live:
            live.pop(min(live))
        else:
            live[number] = made = a_map(page_pool, size * MIB // 2, zero)
            assert not zero or not made.any()
            made.fill_(number)
        assert all((t == n).all() for n, t in live.items())
        if size == 6:
            page_pool.shrink(2 * MIB)


class Live(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1 if n == 0 else 8, 8, 3, padding=1, bias=False) for n in range(3)]
        self.body = nn.Sequential(*(m for conv in layers for m in (conv, nn.BatchNorm2d(8), nn.ReLU())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3))


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(maps_module, "LEAST_BYTES", 1)
    return randomize(Live().double()).train()


def test_the_next_step_needs_no_new_pages(live: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x = accelerate(live, memory_budget="1GiB", tile=32), torch.randn(1, 1, 64, 64, dtype=torch.float64)
    made, make = [], mmap.mmap.__new__

    def counted(cls, *args, **kwargs):
        made.append(args)
        return make(cls, *args, **kwargs)

    monkeypatch.setattr(maps_module.Pages, "__new__", counted)
    counts = []
    for _ in range(3):
        made.clear()
        fast(x).sum().backward()
        counts.append(len(made))
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


def test_steps_on_spare_pages_are_those_on_new_ones(live: nn.Module) -> None:
    """Bit for bit, whatever was there before."""
    fast = accelerate(live, memory_budget="1GiB", tile=16)
    for _ in range(3):
        x = torch.randn(2, 1, 61, 53, dtype=torch.float64)
        new = step(accelerate(copy.deepcopy(live), memory_budget="1GiB", tile=16), x)
        found = step_errors(new, step(fast, x))
        assert max(found.values()) == 0, found
        for pages in fast._runner.page_pool.pages:
            torch.frombuffer(pages, dtype=torch.float64).fill_(torch.nan)
    assert fast._runner.page_pool.bytes


def test_copies_of_a_network_have_pages_of_their_own(live: nn.Module) -> None:
    fast = accelerate(live, memory_budget="1GiB", tile=32)
    fast(torch.randn(1, 1, 64, 64, dtype=torch.float64)).sum().backward()
    assert fast._runner.page_pool.bytes
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not twin._runner.page_pool.pages


def test_pages_go_with_the_network(live: nn.Module) -> None:
    fast = accelerate(live, memory_budget="1GiB", tile=32)
    fast(torch.randn(1, 1, 64, 64, dtype=torch.float64)).sum().backward()
    gc.collect()
    there = len(maps_module._PAGES)
    assert there
    del fast
    gc.collect()
    assert len(maps_module._PAGES) < there


@linux
def test_a_process_that_is_forked_gets_none() -> None:
    """Workers that read images would otherwise keep a copy of the maps of the step in which they were made."""
    page_pool = PagePool()
    a_map(page_pool, 64 * MIB).fill_(1)
    before = used_bytes()
    child = os.fork()
    if child == 0:
        os._exit(0 if used_bytes() < before - 60 * MIB else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
