"""The pages of maps without an arena: their own, zero if that is asked for, and returned with the map."""

from __future__ import annotations

import copy
import gc
import os
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
from gigamorph.engine.tiling.stored_maps import let_rows_go, new_map

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("no_arena")  # with an arena its blocks serve; see test_arena.py
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages do not go back")


def a_map(size: int = MIB, zero: bool = False) -> torch.Tensor:
    return new_map(torch.empty(0, 0, 0, 0), (1, 1, size // 4096, 1024), zero=zero)


@linux
def test_pages_return_to_the_system_with_the_last_view() -> None:
    made = a_map(64 * MIB).fill_(1)
    view, before = made[:, :, 2:5], used_bytes()
    del made
    assert before - used_bytes() < MIB
    del view
    assert before - used_bytes() > 60 * MIB


@linux
def test_rows_return_to_the_system() -> None:
    made = a_map(64 * MIB).fill_(1)
    before = used_bytes()
    let_rows_go(made, (2, 3), 1)
    assert before - used_bytes() > 60 * MIB and (made[:, :, 0] == 1).all()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.booleans()), max_size=20))
def test_maps_that_live_together_never_share_memory(moves: list[tuple[bool, int, bool]]) -> None:
    live = {}
    for number, (dies, size, zero) in enumerate(moves):
        if dies and live:
            live.pop(min(live))
        else:
            live[number] = made = a_map(size * MIB // 2, zero)
            assert not zero or not made.any()
            made.fill_(number)
        assert all((t == n).all() for n, t in live.items())


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


def test_later_steps_are_those_of_a_new_network(live: nn.Module) -> None:
    """Bit for bit."""
    fast = accelerate(live, memory_budget="1GiB", tile=16)
    for _ in range(3):
        x = torch.randn(2, 1, 61, 53, dtype=torch.float64)
        new = step(accelerate(copy.deepcopy(live), memory_budget="1GiB", tile=16), x)
        found = step_errors(new, step(fast, x))
        assert max(found.values()) == 0, found


def test_pages_go_with_the_graph(live: nn.Module) -> None:
    fast = accelerate(live, memory_budget="1GiB", tile=32)
    gc.collect()
    before = len(maps_module._PAGES)
    result = fast(torch.randn(1, 1, 64, 64, dtype=torch.float64))
    assert len(maps_module._PAGES) > before
    result.sum().backward()
    del result
    gc.collect()
    assert len(maps_module._PAGES) == before


@linux
def test_a_process_that_is_forked_gets_none() -> None:
    """Workers that read images would otherwise keep a copy of the maps of the step in which they were made."""
    made = a_map(64 * MIB).fill_(1)
    before = used_bytes()
    child = os.fork()
    if child == 0:
        os._exit(0 if used_bytes() < before - 60 * MIB else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and made.numel()
