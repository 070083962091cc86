"""Memory of maps on the CPU: separate pages per map, in memory or in a file.

The C library's heap would retain freed maps in fragments. Separate pages return to the system when a map is freed, or
row by row before. With an arena, maps in memory are blocks of the arena, whose free pages serve all later blocks.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref

import torch
from torch import Tensor

from .arena import Arena, arena, in_arena, loaded
from .halos import disk_errors

GIVES_BACK = sys.platform == "linux"  # on other systems MADV_DONTNEED is only a hint


class Pages(mmap.mmap):
    """The memory of one map.

    Attributes:
        on_disk: whether the pages belong to a file.
        readers: number of backwards that will still read the map.
    """

    on_disk: bool
    readers: int

    @classmethod
    def make(cls, size: int, on_disk: bool) -> Pages:
        """Allocate `size` zero bytes.

        Raises:
            GigamorphError: if the disk is full.
        """
        if on_disk:
            with tempfile.TemporaryFile(prefix="gigamorph-map-") as file, disk_errors(size):
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # otherwise a full disk would kill the process later
                else:
                    os.ftruncate(file.fileno(), size)
                pages = cls(file.fileno(), size)
        else:
            pages = cls(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_DONTFORK"):
                pages.madvise(mmap.MADV_DONTFORK)  # forked image readers would retain a copy
        pages.on_disk, pages.readers = on_disk, 0
        return pages

    def release(self, start: int, stop: int) -> None:
        """Return the whole pages between two byte offsets to the system; pages in memory then read as zeros."""
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if GIVES_BACK and start < stop:
            self.madvise(mmap.MADV_DONTNEED, start, stop - start)


class ArenaPages:
    """The memory of one map as a block of the arena; see `Pages`."""

    on_disk = False

    def __init__(self, block: Tensor, owner: Arena):
        self.readers = 0
        self._start, self._size, self._owner = block.data_ptr(), block.nbytes, owner

    def __len__(self) -> int:
        return self._size

    def zero_later(self) -> None:
        """Set all bytes to zero; pages become resident when they are written."""
        self._owner.zero_later(self._start, self._size)

    def release(self, start: int, stop: int) -> None:
        """Return the whole pages between two byte offsets to the system."""
        self._owner.discard(self._start + start, stop - start)


def pages_in_memory(size: int) -> tuple[Pages | ArenaPages, memoryview]:
    """Pages and a view of their first `size` bytes, which keeps them alive."""
    found = arena()
    if found is not None:
        return _of_arena(size, found)
    pages = Pages.make(size, on_disk=False)
    return pages, memoryview(pages)


def _of_arena(size: int, owner: Arena) -> tuple[ArenaPages, memoryview]:
    with in_arena(torch.device("cpu")):
        block = torch.empty(size, dtype=torch.uint8)
    pages, view = ArenaPages(block, owner), memoryview(block.numpy().data)
    weakref.finalize(view, _keep_alive, pages).atexit = False  # keeps the pages alive as long as the view
    return pages, view


def _keep_alive(_pages: ArenaPages) -> None:
    """Does nothing: the finalizer's reference to the pages keeps them alive until the view is freed."""


def trim_arena() -> None:
    """Return the free pages of the arena to the system."""
    found = loaded()
    if found is not None:
        found.trim()
