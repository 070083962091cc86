"""Byte counts: parse and print them, and read how much memory this process holds."""

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
_LARGEST = (1 << 31) - 1  # that it takes
_USUAL_MMAP, _USUAL_TRIM = 32 << 20, 64 << 20  # where glibc's own adjustment ends
_ALONE = 1 << 18


def parse_bytes(size: int | float | str) -> int:
    """Bytes from a number or a text such as ``"4GiB"``, ``"800MB"``, ``"1.5G"``.

    Raises:
        GigamorphError: if it is no size, the size is not positive, or a text without a unit says less than a MiB: its
            unit was left out.
    """
    bare = isinstance(size, str) and size.strip()[-1:].isdecimal()
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", size.lower())
        if not match or match[2] not in _UNITS:
            raise GigamorphError(f"memory size {size!r} is not understood; write it like 4GiB, 800MiB or 6GB")
        size = float(match[1]) * _UNITS[match[2]]
    if isinstance(size, bool) or not isinstance(size, numbers.Real) or not math.isfinite(size):
        raise GigamorphError(f"memory size {size!r} is not understood; give bytes, or write it like 4GiB")
    if size < 1:
        raise GigamorphError(f"memory size {size} must be positive, a byte or more")
    if bare and size < 1 << 20:
        raise GigamorphError(f"memory size {size:g} is in bytes, too few for any image; write {size:g}GiB or so")
    return int(size)


def format_bytes(size: float) -> str:
    """``"1.50 GiB"``: three significant digits, binary units."""
    number, digits, unit = _in_units(size)
    return f"{number:.{digits}f} {unit}"


def format_enough(size: float) -> str:
    """The same, rounded up: whoever gives as much gives enough."""
    number, digits, unit = _in_units(size)
    return f"{math.ceil(number * 10**digits) / 10**digits:.{digits}f} {unit}"


def _in_units(size: float) -> tuple[float, int, str]:
    """A number of bytes in the largest unit of which it has one, how many decimals it is told with, and the unit."""
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
    """Give what the arena and the C library's heap hold and nothing uses back to the system."""
    found = loaded()
    if found is not None:
        found.trim()
    trim_heap()


def trim_heap() -> None:
    """Give what the C library's heap holds and nothing uses back to the system, where that is possible."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's heap; None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def new_blocks_on_own_pages(alone: bool) -> None:
    """Whether large blocks that find no hole in the heap get pages of their own; else the heap grows (glibc).

    Those pages go back to the system as soon as the blocks are freed: the process then holds what is in use. But new
    pages cost several times what the bytes in them cost that are there already.
    """
    set_option = _glibc("mallopt")
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _ALONE if alone else _USUAL_MMAP)
        set_option(_M_TRIM_THRESHOLD, _USUAL_TRIM)


@contextlib.contextmanager
def large_blocks_on_own_pages() -> Iterator[None]:
    """Within it, blocks of a MiB and more go back to the system as soon as they are freed (glibc).

    For work on files, where the time that new pages cost does not count.
    """
    with _heap({_M_MMAP_THRESHOLD: 1 << 20}):
        yield


@contextlib.contextmanager
def freed_pages_kept() -> Iterator[None]:
    """Within it, freed blocks of any size stay with the process, whose next ones need no new pages (glibc).

    For work that copies whole networks several times, of which new pages take a third of the time. After it they go
    back to the system.
    """
    with _heap({_M_MMAP_THRESHOLD: _LARGEST, _M_TRIM_THRESHOLD: _LARGEST}):
        yield
    return_free_pages()


@contextlib.contextmanager
def _heap(thresholds: dict[int, int]) -> Iterator[None]:
    """glibc's heap with other thresholds. After it blocks of up to 32 MiB stay with the process, as they do in one
    that has freed such blocks before."""
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
    """Bytes in use now: on a GPU the allocator's and what captured graphs hold, else this process's resident set."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + _held_by_graphs(_index(device))
    return resident_bytes()


def resident_bytes() -> int:
    """This process's resident set; where it is not Linux, the largest that it was. Read before every op of a step."""
    if sys.platform == "linux":
        return int(os.pread(_statm(), 128, 0).split()[1]) * mmap.PAGESIZE
    return peak_bytes("cpu")


def mapped_bytes() -> int:
    """What of the resident set are pages of files, libraries among them; 0 where it is not Linux."""
    return int(os.pread(_statm(), 128, 0).split()[2]) * mmap.PAGESIZE if sys.platform == "linux" else 0


_SHARED_POOL = (0, 0)  # of all that no graph has to itself
_peak_at_capture: dict[int, int] = {}  # of GPUs on which graphs were captured: the allocator's peak after the latest


def note_capture(device: torch.device) -> None:
    """A graph was captured on this GPU: from now on it holds memory that the allocator calls free."""
    _peak_at_capture[_index(device)] = torch.cuda.max_memory_allocated(device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _held_by_graphs(index: int) -> int:
    """Bytes in which captured graphs work; every replay writes them."""
    if index not in _peak_at_capture:  # the snapshot takes long, and progress asks often
        return 0
    segments = (s for s in torch.cuda.memory_snapshot() if s["device"] == index)
    return sum(s["total_size"] - s["allocated_size"] for s in segments if s["segment_pool_id"] != _SHARED_POOL)


@functools.cache
def _statm() -> int:
    """The file of this process's sizes, kept open: it is read after every op, and opening takes most of that."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_statm.cache_clear)  # what was opened before is the parent's


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The largest figure of `used_bytes` since the process started or `reset_peak` was called.

    On a GPU, where graphs were captured meanwhile: at least this, for the allocator's peak is that of a capture, which
    is of the memory that its graph holds.
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
    """Start `peak_bytes` anew (on Linux and on CUDA; elsewhere the peak is that of the whole process)."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that a step may still take on this device."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 * 2**30
