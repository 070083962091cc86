"""How many bytes a text says, and what becomes of freed memory."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from gigamorph.engine.tiling import memory
from gigamorph.engine.tiling.memory import (
    freed_pages_kept,
    note_capture,
    parse_bytes,
    peak_bytes,
    return_free_pages,
    used_bytes,
)

MIB = 1 << 20


@pytest.mark.parametrize("thousand", [("", 1000), ("i", 1024)])
def test_sizes_by_their_units(thousand: tuple[str, int]) -> None:
    """GB are decimal and GiB binary, in letters of any case, with the B or without."""
    i, base = thousand
    for power, letter in enumerate("KMGT", 1):
        for text in (f"3{letter}{i}B", f"3 {letter.lower()}{i}", f" 3.0{letter}{i}b "):
            assert parse_bytes(text) == 3 * base**power
    assert parse_bytes(f"1.5G{i}B") == 1.5 * base**3 and parse_bytes(base**3) == base**3


def grow_and_free() -> int:
    """Bytes that the process still holds of 256 MiB in blocks of 4 MiB."""
    return_free_pages()
    before = used_bytes()
    blocks = [torch.ones(MIB) for _ in range(64)]
    assert used_bytes() - before > 200 * MIB
    del blocks
    return used_bytes() - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_pages_are_kept_and_then_returned() -> None:
    before = used_bytes()
    with freed_pages_kept():
        assert grow_and_free() > 200 * MIB
    assert used_bytes() - before < 50 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts resident pages by process")
def test_a_forked_process_counts_its_own_pages() -> None:
    before = used_bytes()  # opens what the child must not read
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        first = used_bytes()
        _grown = bytearray(os.urandom(1)) * (300 * MIB)
        os.write(writing, str(used_bytes() - first).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 64)) > 200 * MIB and abs(used_bytes() - before) < 50 * MIB


class Allocator:
    """Stands for that of a GPU: bytes in use, their peak, and what the pools of graphs have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        self.segments: list[dict[str, object]] = []
        self.snapshots = 0
        monkeypatch.setattr(memory, "_peak_at_capture", {})
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", self.snapshot)

    def snapshot(self) -> list[dict[str, object]]:
        self.snapshots += 1
        return self.segments

    def use(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def segment(self, total: int, used: int, pool: tuple[int, int], device: int = 0) -> None:
        self.segments.append({"device": device, "total_size": total, "allocated_size": used, "segment_pool_id": pool})

    def capture(self, total: int, kept: int = 0) -> None:
        """A graph that works in so many bytes, of which some stay in use."""
        self.use(total)
        self.use(kept - total)
        self.segment(total, kept, (0, 1))
        note_capture(torch.device("cuda", 0))


def test_memory_of_captured_graphs_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator calls it free, but every replay writes it."""
    gpu = Allocator(monkeypatch)
    gpu.use(10)
    gpu.segment(100, 10, (0, 0))
    assert (used_bytes("cuda"), peak_bytes("cuda"), gpu.snapshots) == (10, 10, 0), "no snapshot where nothing is held"
    gpu.capture(1000, kept=5)
    gpu.segment(7000, 0, (0, 1), device=1)
    assert used_bytes("cuda") == used_bytes("cuda:0") == 10 + 1000
    gpu.most = gpu.now  # the peak starts anew
    assert peak_bytes("cuda") == 10 + 1000
    gpu.use(300)
    gpu.use(-300)
    assert (used_bytes("cuda"), peak_bytes("cuda")) == (1010, 1310)
    assert (used_bytes("cuda:1"), peak_bytes("cuda:1")) == (gpu.now, gpu.most), "nothing was captured on another"


def test_the_peak_of_a_capture_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Allocator(monkeypatch)
    gpu.use(10)
    gpu.capture(1000)
    gpu.use(300)
    gpu.use(-300)
    assert gpu.most == 1010 and peak_bytes("cuda") == 1010
    gpu.use(1100)
    gpu.use(-1100)
    assert peak_bytes("cuda") == 10 + 1100 + 1000, "what came after the capture came on top of its memory"
