"""Byte counts: parsing, formatting, and the memory that this process uses."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import numbers
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..errors import GigamorphError
from .arena import loaded

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST = (1 << 31) - 1  # the largest value that mallopt accepts
_USUAL_MMAP, _USUAL_TRIM = 32 << 20, 64 << 20  # upper limits of glibc's own adjustment
_ALONE = 1 << 18


def parse_bytes(size: int | float | str) -> int:
    """Bytes from a number or a string like ``"4GiB"``, ``"800MB"``, ``"1.5G"``.

    Raises:
        GigamorphError: if the size is invalid or not positive, or a string without a unit is below 1 MiB, because its
            unit is probably missing.
    """
    bare = isinstance(size, str) and size.strip()[-1:].isdecimal()
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", size.lower())
        if not match or match[2] not in _UNITS:
            raise GigamorphError(f"memory size {size!r} is invalid; write it like 4GiB, 800MiB or 6GB")
        size = float(match[1]) * _UNITS[match[2]]
    if isinstance(size, bool) or not isinstance(size, numbers.Real) or not math.isfinite(size):
        raise GigamorphError(f"memory size {size!r} is invalid; pass bytes, or write it like 4GiB")
    if size < 1:
        raise GigamorphError(f"memory size must be at least 1 byte, not {size}")
    if bare and size < 1 << 20:
        raise GigamorphError(f"memory size {size:g} means bytes, which is too small; add a unit, as in {size:g}GiB")
    return int(size)


def format_bytes(size: float) -> str:
    """``"1.50 GiB"``: three significant digits, binary units."""
    number, digits, unit = _in_units(size)
    return f"{number:.{digits}f} {unit}"


def format_enough(size: float) -> str:
    """Like `format_bytes`, but rounded up, so that the printed size is sufficient."""
    number, digits, unit = _in_units(size)
    return f"{math.ceil(number * 10**digits) / 10**digits:.{digits}f} {unit}"


def _in_units(size: float) -> tuple[float, int, str]:
    """A byte count in its largest fitting unit: the number, its decimal places, and the unit."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return size, 0 if unit == "B" or abs(size) >= 100 else 1 if abs(size) >= 10 else 2, unit


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def return_free_pages() -> None:
    """Return unused pages of the arena and the C library's heap to the system."""
    found = loaded()
    if found is not None:
        found.trim()
    trim_heap()


def trim_heap() -> None:
    """Return unused pages of the C library's heap to the system, if the C library supports it."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's heap, or None with another C library."""
    return getattr(_libraries(), name, None) if sys.platform == "linux" else None


@functools.cache
def _libraries() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def new_blocks_on_own_pages(alone: bool) -> None:
    """Set whether glibc maps separate pages for large blocks that fit no hole of the heap; otherwise the heap grows.

    Separate pages return to the system as soon as their block is freed, so the process holds only bytes in use. But
    writing to new pages costs several times as much as writing to resident ones.
    """
    set_option = _glibc("mallopt")
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _ALONE if alone else _USUAL_MMAP)
        set_option(_M_TRIM_THRESHOLD, _USUAL_TRIM)


@contextlib.contextmanager
def large_blocks_on_own_pages() -> Iterator[None]:
    """Context in which blocks of 1 MiB and more return to the system as soon as they are freed (glibc).

    Meant for work on files, where the cost of new pages is negligible.
    """
    with _heap({_M_MMAP_THRESHOLD: 1 << 20}):
        yield


@contextlib.contextmanager
def freed_pages_kept() -> Iterator[None]:
    """Context in which the heap retains freed blocks of any size, so that later blocks need no new pages (glibc).

    Meant for work that copies whole networks several times, where new pages take a third of the time. The pages return
    to the system at the end.
    """
    with _heap({_M_MMAP_THRESHOLD: _LARGEST, _M_TRIM_THRESHOLD: _LARGEST}):
        yield
    return_free_pages()


@contextlib.contextmanager
def _heap(thresholds: dict[int, int]) -> Iterator[None]:
    """Context with other thresholds of glibc's heap.

    Afterwards the heap retains freed blocks of up to 32 MiB, as it does in a process that has freed such blocks before.
    """
    set_option = _glibc("mallopt")
    if set_option is None:
        yield
        return
    for threshold, size in thresholds.items():
        set_option(threshold, size)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _USUAL_MMAP)
        set_option(_M_TRIM_THRESHOLD, _USUAL_TRIM)


def used_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes in use: on a GPU those of the allocator and of captured graphs, else the resident set of this process."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + _held_by_graphs(_index(device))
    return resident_bytes()


def resident_bytes() -> int:
    """The resident set of this process; outside Linux, its peak. It is read before every op of a step."""
    if sys.platform == "linux":
        return int(os.pread(_statm(), 128, 0).split()[1]) * mmap.PAGESIZE
    return peak_bytes("cpu")


def mapped_bytes() -> int:
    """The file-backed part of the resident set, including libraries; 0 outside Linux."""
    return int(os.pread(_statm(), 128, 0).split()[2]) * mmap.PAGESIZE if sys.platform == "linux" else 0


_SHARED_POOL = (0, 0)  # the pool of segments that belong to no graph
_peak_at_capture: dict[int, int] = {}  # GPU index -> the allocator's peak after the latest capture on it


def note_capture(device: torch.device) -> None:
    """Record that a graph was captured on this GPU: it holds memory that the allocator reports as free."""
    _peak_at_capture[_index(device)] = torch.cuda.max_memory_allocated(device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _held_by_graphs(index: int) -> int:
    """Bytes that captured graphs hold and write in every replay."""
    if index not in _peak_at_capture:  # the snapshot is slow, and progress bars call this often
        return 0
    segments = (s for s in torch.cuda.memory_snapshot() if s["device"] == index)
    return sum(s["total_size"] - s["allocated_size"] for s in segments if s["segment_pool_id"] != _SHARED_POOL)


@functools.cache
def _statm() -> int:
    """The descriptor of /proc/self/statm. It stays open: opening it takes longer than reading, which every op does."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_statm.cache_clear)  # the inherited descriptor reads the parent's sizes


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The peak of `used_bytes` since the process started or since `reset_peak`.

    If graphs were captured on the GPU meanwhile, this is a lower bound: the allocator's peak may stem from a capture,
    whose memory its graph holds.
    """
    device = torch.device(device)
    if device.type == "cuda":
        most, index = torch.cuda.max_memory_allocated(device), _index(device)
        if most == _peak_at_capture.get(index):
            return max(most, used_bytes(device))
        return most + _held_by_graphs(index)
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: torch.device | str = "cpu") -> None:
    """Reset `peak_bytes` (on Linux and CUDA; otherwise the peak always covers the whole life of the process)."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that are still available to a step on this device."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 * 2**30
