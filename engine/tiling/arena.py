"""The arena that steps allocate in on the CPU (`arena.cpp`): built once where there is a C++ compiler.

PyTorch's allocator on the CPU is the C library's heap, whose holes aligned blocks of the same size do not fit into: a
training step of ResNet-18 in tiles of 512 held 650 MiB for 300 that were in use, and under a budget gave a million
pages back and got them again. In the arena it holds 320. What steps allocate on the CPU goes there, what else the
process does is left to PyTorch. Where it cannot be built the heap serves, as `memory_limit.py` keeps it.
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
    """Bytes of the arena.

    Attributes:
        in_use: of blocks, but for pages of them that were discarded.
        held: of pages that this process has.
        most: of `in_use`, at most since `reset_most`.
    """

    in_use: int
    held: int
    most: int

    @property
    def spare(self) -> int:
        """What is held and not in use."""
        return self.held - self.in_use


class Arena:
    """The loaded arena of this process; there is one.

    Args:
        library: what was built of `arena.cpp`.
        addresses: bytes of addresses that it may have.

    Raises:
        OSError: if it cannot be loaded, or does not get its addresses.
    """

    def __init__(self, library: Path, addresses: int):
        self._lib = lib = ctypes.PyDLL(str(library))  # its functions take less time than giving up the interpreter
        lib.arena_install.argtypes, lib.arena_install.restype = [ctypes.c_size_t], ctypes.c_bool
        lib.arena_room.argtypes = [ctypes.c_int64]
        lib.arena_discard.argtypes = lib.arena_zero_later.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._counted = (ctypes.c_size_t * 3)()
        if not lib.arena_install(addresses):
            raise OSError("this process does not get the addresses, or has another allocator")
        self.enter, self.leave = lib.arena_enter, lib.arena_leave
        self.no_limit, self.trim, self.reset_most = lib.arena_no_limit, lib.arena_trim, lib.arena_reset_most
        self.room, self.discard, self.zero_later = lib.arena_room, lib.arena_discard, lib.arena_zero_later

    def counts(self) -> Counts:
        """What it holds now."""
        self._lib.arena_counts(self._counted)
        return Counts(*self._counted)


@functools.cache
def _found() -> Arena | str:
    """The arena, or why there is none."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    if mmap.PAGESIZE != _PAGE:
        return f"it needs pages of {_PAGE} bytes, and here they have {mmap.PAGESIZE}"
    try:
        addresses = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Arena(_built(), addresses)
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("steps use the C library's heap: %s", error)
        return str(error)


def arena() -> Arena | None:
    """The arena; None where it cannot be had. It is built when it is asked for first, in a second or two."""
    found = _found()
    return None if isinstance(found, str) else found


def loaded() -> Arena | None:
    """The arena, if it has been asked for."""
    return arena() if _found.cache_info().currsize else None


def missing() -> str | None:
    """Why there is no arena; None where there is one."""
    found = _found()
    return found if isinstance(found, str) else None


@contextlib.contextmanager
def in_arena(device: torch.device) -> Iterator[None]:
    """Within it, what this thread allocates on the CPU comes from the arena, if that is where it computes."""
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
