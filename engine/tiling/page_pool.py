"""Memory of maps on the CPU: separate pages per map, in memory or in a file, and a pool of pages for reuse.

The C library's heap would retain freed maps in fragments. Separate pages return to the system when a map is freed, or
row by row before. But new pages are slow because the system clears them: with norms in training mode this takes a tenth
of the step or more. So while the limit allows it, pages of freed maps are reused.

With an arena, maps in memory are blocks of the arena, whose free pages serve all later blocks.
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
_LARGEST_SHARE = 2  # a free block of pages is reused if it is at most this many times the requested size


class Pages(mmap.mmap):
    """The memory of one map.

    Attributes:
        on_disk: whether the pages belong to a file.
        readers: number of backwards that will still read the map.
        whole: whether no page has been returned to the system.
        clear: whether the pages are new and therefore zero.
    """

    on_disk: bool
    readers: int
    whole: bool
    clear: bool

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
        pages.on_disk, pages.readers, pages.whole, pages.clear = on_disk, 0, True, True
        return pages

    def release(self, start: int, stop: int) -> None:
        """Return the whole pages between two byte offsets to the system; pages in memory then read as zeros."""
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if GIVES_BACK and start < stop:
            self.madvise(mmap.MADV_DONTNEED, start, stop - start)
            self.whole = False


class ArenaPages:
    """The memory of one map as a block of the arena; see `Pages`."""

    on_disk, clear = False, False

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


class PagePool:
    """Pages of freed maps in memory, stored for reuse until the memory is needed.

    Each network has its own pool. When the pool is freed, the free pages of the arena are returned to the system, too.
    """

    def __init__(self) -> None:
        self.pages: list[Pages] = []
        weakref.finalize(self, _trim_arena).atexit = False

    @property
    def bytes(self) -> int:
        """Total size of the pages in the pool."""
        return sum(map(len, self.pages))

    def take(self, size: int) -> tuple[Pages | ArenaPages, memoryview]:
        """Pages and a view of their first `size` bytes; when the view is freed, the pages return to the pool."""
        found = arena()
        if found is not None:
            return _of_arena(size, found)
        fitting = [p for p in self.pages if size <= len(p) <= _LARGEST_SHARE * size]
        pages = min(fitting, key=len, default=None)
        if pages is None:
            pages = Pages.make(size, on_disk=False)
        else:
            self.pages = [p for p in self.pages if p is not pages]
            pages.readers, pages.clear = 0, False
        view = memoryview(pages)[:size]
        weakref.finalize(view, self._back, pages).atexit = False
        return pages, view

    def _back(self, pages: Pages) -> None:
        if pages.whole:
            self.pages.append(pages)

    def shrink(self, size: int) -> None:
        """Free pages, the oldest first, until the pool holds at most `size` bytes."""
        while self.pages and self.bytes > size:
            self.pages.pop(0)


def _of_arena(size: int, owner: Arena) -> tuple[ArenaPages, memoryview]:
    with in_arena(torch.device("cpu")):
        block = torch.empty(size, dtype=torch.uint8)
    pages, view = ArenaPages(block, owner), memoryview(block.numpy().data)
    weakref.finalize(view, _keep_alive, pages).atexit = False  # keeps the pages alive as long as the view
    return pages, view


def _keep_alive(_pages: ArenaPages) -> None:
    """Does nothing: the finalizer's reference to the pages keeps them alive until the view is freed."""


def _trim_arena() -> None:
    found = loaded()
    if found is not None:
        found.trim()
