"""The arena that steps allocate in: blocks that do not touch, counts that are true, and steps without it."""

from __future__ import annotations

import functools
import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from exactness import step, step_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gigamorph import accelerate
from gigamorph.engine.tiling import arena as module
from gigamorph.engine.tiling.arena import Arena, arena, in_arena
from gigamorph.engine.tiling.memory import return_free_pages, used_bytes
from gigamorph.engine.tiling.stored_maps import let_rows_go, new_map
from gigamorph.kernels import cpp

CPU = torch.device("cpu")
LEAST = 64 << 10  # bytes of a block that the arena takes
PAGE = 4096


@pytest.fixture
def there() -> Arena:
    found = arena()
    if found is None:
        pytest.skip(f"no arena: {module.missing()}")
    gc.collect()
    found.trim()
    return found


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(LEAST, 40 * LEAST)), max_size=60), st.randoms())
def test_blocks_do_not_touch_and_are_counted(changes, random) -> None:
    """Ten places, each of which gets a block of another size, or its free pages back, or is read."""
    found = arena()
    if found is None:
        pytest.skip("no arena")
    before = found.counts().in_use
    blocks: dict[int, torch.Tensor] = {}
    for value, (place, size) in enumerate(changes):
        blocks.pop(place, None)
        if random.random() < 0.2:
            found.room(random.randrange(-4, 4) << 16)
        if random.random() < 0.8:
            with in_arena(CPU):
                blocks[place] = torch.full((size,), value % 251, dtype=torch.uint8)
            assert int(blocks[place][0]) == int(blocks[place][-1]) == value % 251
            blocks[place].fill_(place)
        counts = found.counts()
        assert counts.in_use - before == sum(-(-len(block) // PAGE) * PAGE for block in blocks.values())
        assert counts.held >= counts.in_use
    found.no_limit()
    assert all(bool((block == place).all()) for place, block in blocks.items())
    blocks.clear()
    assert found.counts().in_use == before


def test_a_hole_serves_blocks_of_its_own_size(there: Arena) -> None:
    """What the C library's heap does not do: between neighbours that are in use."""
    with in_arena(CPU):
        row = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(9)]
        held = there.counts().held
        for place in (1, 3, 5, 7) * 5:
            row[place] = row[place][:0].new_empty(0)
            row[place] = torch.zeros(1 << 20, dtype=torch.uint8)
    assert there.counts().held == held


def test_free_pages_go_back_before_more_come_than_there_is_room_for(there: Arena) -> None:
    with in_arena(CPU):
        small = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(16)]
        keep = small[1::2]
        del small
        before = there.counts()
        assert before.spare >= 8 << 20
        there.room(1 << 20)  # for a block of four there is no hole, and only one MiB of new pages
        large = torch.zeros(4 << 20, dtype=torch.uint8)
        assert there.counts().held <= before.held + (1 << 20)
        larger = torch.zeros(64 << 20, dtype=torch.uint8)  # not enough could go back: it comes anyway
        there.no_limit()
    assert int(large.sum()) == int(larger.sum()) == sum(int(one.sum()) for one in keep) == 0


def test_what_is_freed_goes_back_where_that_is_beyond_the_limit(there: Arena) -> None:
    """Blocks outside of it may have come meanwhile, for which there has to be room."""
    with in_arena(CPU):
        blocks = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(4)]
    counts = there.counts()
    there.room(counts.in_use - counts.held - (2 << 20))
    blocks.clear()
    held = there.counts().held
    there.no_limit()
    assert held == counts.in_use - (2 << 20)


def test_what_is_trimmed_is_not_this_process_s_any_more(there: Arena) -> None:
    with in_arena(CPU):
        block = torch.ones(64 << 20, dtype=torch.uint8)
    used, most = used_bytes(), there.counts().most
    del block
    assert there.counts().spare >= 64 << 20 and most >= 64 << 20
    return_free_pages()
    assert there.counts().spare == 0 and used_bytes() < used - (60 << 20)
    there.reset_most()
    assert there.counts().most == there.counts().in_use


def test_rows_of_a_map_go_back_before_it_is_gone(there: Arena) -> None:
    before = there.counts()
    made = new_map(torch.empty(0), [1, 64, 1 << 14], order=(0, 1, 2))  # 4 MiB, rows of 64 KiB
    made.fill_(1)
    assert there.counts().in_use == there.counts().held == before.in_use + (4 << 20)
    let_rows_go(made, (1, 2), 32)
    assert there.counts().in_use == there.counts().held == before.in_use + (2 << 20)
    assert int(made.sum()) == 32 << 14  # what is left of it, and zeros
    del made
    assert there.counts().in_use == before.in_use and there.counts().spare == 2 << 20
    again = new_map(torch.empty(0), [1, 64, 1 << 14], zero=True, order=(0, 1, 2))
    assert int(again.sum()) == 0 and there.counts().held == before.in_use + (4 << 20)


@pytest.mark.parametrize("later", [False, True])
def test_zeros_may_take_memory_as_they_are_written_to(later: bool, there: Arena) -> None:
    """Of pages that had something else in them; a size that is no number of pages."""
    with in_arena(CPU):
        block = torch.ones((64 << 20) + 5000, dtype=torch.uint8)
    del block
    before, counts = used_bytes(), there.counts()
    made = new_map(torch.empty(0), [1, 16000, 1001], zero=True, order=(0, 1, 2), later=later)  # 61 MiB
    there.trim()  # what is left of the larger block
    assert there.counts().held == there.counts().in_use >= counts.in_use + (61 << 20)
    assert before - used_bytes() > 60 << 20 if later else used_bytes() > before - (4 << 20)
    assert made.count_nonzero() == 0
    made[:, 7000:9000] = 1
    assert int(made.sum()) == 2000 * 1001


def test_other_threads_and_small_blocks_stay_with_pytorch(there: Arena) -> None:
    made: list[torch.Tensor] = []
    before = there.counts().in_use
    with in_arena(CPU):
        made.append(torch.zeros(LEAST // 2, dtype=torch.uint8))
        thread = threading.Thread(target=lambda: made.append(torch.zeros(LEAST * 2, dtype=torch.uint8)))
        thread.start()
        thread.join()
        assert there.counts().in_use == before
        made.append(torch.zeros(LEAST * 2, dtype=torch.uint8))
        with in_arena(CPU):  # a step within a step
            pass
        made.append(torch.zeros(LEAST * 2, dtype=torch.uint8))
    made.append(torch.zeros(LEAST * 2, dtype=torch.uint8))
    assert there.counts().in_use == before + 4 * LEAST
    thread = threading.Thread(target=made.clear)  # the last user may be another thread
    thread.start()
    thread.join()
    assert there.counts().in_use == before


def test_blocks_may_change_their_size_and_be_saved(there: Arena, tmp_path: Path) -> None:
    with in_arena(CPU):
        block = torch.arange(LEAST, dtype=torch.float32)
    block.resize_(4 * LEAST)
    assert torch.equal(block[:LEAST], torch.arange(LEAST, dtype=torch.float32))
    torch.save(block[:LEAST].clone(), tmp_path / "block.pt")
    assert torch.equal(torch.load(tmp_path / "block.pt"), block[:LEAST])
    assert block[:LEAST].clone().share_memory_().is_shared()


def test_a_forked_process_allocates_for_itself(there: Arena) -> None:
    with in_arena(CPU):
        block = torch.ones(LEAST, dtype=torch.uint8)
    child = os.fork()
    if child == 0:
        with in_arena(CPU):
            own = torch.full((LEAST * 3,), 2, dtype=torch.uint8)
        os._exit(0 if int(own.sum()) == 6 * LEAST and int(block.sum()) == LEAST else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert int(block.sum()) == LEAST


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)).double()


@pytest.mark.parametrize("budget", [None, "80MiB"])
def test_a_step_leaves_nothing_in_it_but_what_it_returns(there: Arena, budget: str | None) -> None:
    net, image = accelerate(_network(), memory_budget=budget, tile=64), torch.randn(1, 3, 200, 180).double()
    before = there.counts().in_use
    there.reset_most()
    net(image).sum().backward()
    assert there.counts().most > before + LEAST  # it was there
    net.zero_grad()
    gc.collect()
    assert there.counts().in_use == before and there.counts().spare > LEAST
    del net
    gc.collect()
    assert there.counts().spare == 0  # what the last one has left goes with it


@pytest.mark.parametrize("budget", [None, "80MiB"])
def test_without_a_compiler_steps_give_the_same(
    budget: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And say why to whoever asks."""
    monkeypatch.setenv("GIGAMORPH_CACHE", str(tmp_path))
    monkeypatch.setattr(cpp.shutil, "which", lambda _: None)
    monkeypatch.setattr(module, "_found", functools.cache(module._found.__wrapped__))
    assert arena() is None
    assert module.missing() == "no C++ compiler; install g++ or set CXX"
    net, image = _network().eval(), torch.randn(1, 3, 200, 180).double()
    twin = accelerate(_network().eval(), memory_budget=budget, tile=64)
    errors = step_errors(step(net, image), step(twin, image))
    assert max(errors.values()) < 1e-12


def test_a_compiler_that_fails_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("GIGAMORPH_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(failing))
    monkeypatch.setattr(module, "_found", functools.cache(module._found.__wrapped__))
    assert module.missing() == f"{failing} cannot build the library: no such header"
    assert list((tmp_path / "gigamorph" / "arena").iterdir()) == []
