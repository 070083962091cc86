"""A CPU memory arena (`arena.cpp`) from which steps allocate; it is compiled once if a C++ compiler is available.

PyTorch allocates CPU memory from the C library's heap, which does not reuse a hole for an aligned block of the same
size. A training step of ResNet-18 in tiles of 512 therefore held 650 MiB while 300 MiB were in use. Under a budget it
returned a million pages and requested them again. With the arena it holds 320 MiB. Only steps allocate from the arena;
the rest of the process uses PyTorch's allocator. If the arena cannot be built, steps use the heap, and
`memory_limit.py` limits it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ...kernels.cpp import built

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_PAGE = 4096  # bytes, as in the source


class Counts(NamedTuple):
    """Byte counts of the arena.

    Attributes:
        in_use: bytes of allocated blocks, without their discarded pages.
        held: bytes of resident pages.
        most: the peak of `in_use` since `reset_most`.
    """

    in_use: int
    held: int
    most: int

    @property
    def spare(self) -> int:
        """Bytes that are held but not in use."""
        return self.held - self.in_use


class Arena:
    """The loaded arena; each process has one.

    Args:
        library: the shared library built from `arena.cpp`.
        addresses: size of the address range to reserve, in bytes.

    Raises:
        OSError: if the library cannot be loaded or the address range cannot be reserved.
    """

    def __init__(self, library: Path, addresses: int):
        self._lib = lib = ctypes.PyDLL(str(library))  # PyDLL keeps the GIL: releasing it takes longer than these calls
        lib.arena_install.argtypes, lib.arena_install.restype = [ctypes.c_size_t], ctypes.c_bool
        lib.arena_room.argtypes = [ctypes.c_int64]
        lib.arena_discard.argtypes = lib.arena_zero_later.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._counted = (ctypes.c_size_t * 3)()
        if not lib.arena_install(addresses):
            raise OSError("cannot reserve the address range, or another CPU allocator is installed")
        self.enter, self.leave = lib.arena_enter, lib.arena_leave
        self.no_limit, self.trim, self.reset_most = lib.arena_no_limit, lib.arena_trim, lib.arena_reset_most
        self.room, self.discard, self.zero_later = lib.arena_room, lib.arena_discard, lib.arena_zero_later

    def counts(self) -> Counts:
        """The current byte counts."""
        self._lib.arena_counts(self._counted)
        return Counts(*self._counted)


@functools.cache
def _found() -> Arena | str:
    """The arena, or the reason why it is unavailable."""
    if not sys.platform.startswith("linux"):
        return "it requires Linux"
    if mmap.PAGESIZE != _PAGE:
        return f"it requires a page size of {_PAGE} bytes, but this system uses {mmap.PAGESIZE}"
    try:
        addresses = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Arena(_built(), addresses)
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("steps use the C library's heap: %s", error)
        return str(error)


def arena() -> Arena | None:
    """The arena, or None if it is unavailable. The first call builds it, which takes a second or two."""
    found = _found()
    return None if isinstance(found, str) else found


def loaded() -> Arena | None:
    """The arena if `arena` has been called before, else None."""
    return arena() if _found.cache_info().currsize else None


def missing() -> str | None:
    """The reason why the arena is unavailable, or None if it is available."""
    found = _found()
    return found if isinstance(found, str) else None


@contextlib.contextmanager
def in_arena(device: torch.device) -> Iterator[None]:
    """Context in which CPU allocations of this thread come from the arena, if `device` is the CPU."""
    found = arena() if device.type == "cpu" else None
    if found is None:
        yield
        return
    found.enter()
    try:
        yield
    finally:
        found.leave()


def _built() -> Path:
    folder = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    compiling = ["-O2", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-I", str(folder / "include")]
    return built(_SOURCE, compiling, ["-L", str(folder / "lib"), "-lc10"])
