"""Memory of maps on the CPU: pages of their own, in memory or in a file, and the pages of maps that are gone.

What the C library's heap gets back would stay with the process, in pieces. Pages of their own go back to the system
when a map dies, or row by row before. But new ones cost time (the system clears them, one after the other), for a
network with live statistics a tenth of the step and more; so while there is room, pages of dead maps wait for the next.

Where there is an arena, maps in memory are blocks of it: its free pages serve whatever comes next.
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

GIVES_BACK = sys.platform == "linux"  # elsewhere the advice to let pages go is no order
_LARGEST_SHARE = 2  # of what is asked for, that spare pages may have


class Pages(mmap.mmap):
    """The memory of one map.

    Attributes:
        on_disk: whether it belongs to a file.
        readers: how many backwards will still read the map.
        whole: whether no part of it has been given back.
        clear: whether it is new, so that all of it is zero.
    """

    on_disk: bool
    readers: int
    whole: bool
    clear: bool

    @classmethod
    def make(cls, size: int, on_disk: bool) -> Pages:
        """This many bytes, all zero.

        Raises:
            GigamorphError: if the disk is full.
        """
        if on_disk:
            with tempfile.TemporaryFile(prefix="gigamorph-map-") as file, disk_errors(size):
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would end the process later
                else:
                    os.ftruncate(file.fileno(), size)
                pages = cls(file.fileno(), size)
        else:
            pages = cls(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_DONTFORK"):
                pages.madvise(mmap.MADV_DONTFORK)  # processes that read images would keep a copy
        pages.on_disk, pages.readers, pages.whole, pages.clear = on_disk, 0, True, True
        return pages

    def let_go(self, start: int, stop: int) -> None:
        """Give back the pages that lie wholly between two bytes. Those in memory are zeros from then on."""
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if GIVES_BACK and start < stop:
            self.madvise(mmap.MADV_DONTNEED, start, stop - start)
            self.whole = False


class ArenaPages:
    """The memory of one map, a block of the arena; see `Pages`."""

    on_disk, clear = False, False

    def __init__(self, block: Tensor, owner: Arena):
        self.readers = 0
        self._start, self._size, self._owner = block.data_ptr(), block.nbytes, owner

    def __len__(self) -> int:
        return self._size

    def zero_later(self) -> None:
        """All of it is zero, and in memory once it is written to."""
        self._owner.zero_later(self._start, self._size)

    def let_go(self, start: int, stop: int) -> None:
        """Give back the pages that lie wholly between two bytes."""
        self._owner.discard(self._start + start, stop - start)


class PagePool:
    """Pages in memory of maps that are gone, kept for the next ones until the room is needed.

    It is a network's: when that is gone, the free pages of the arena go, too.
    """

    def __init__(self) -> None:
        self.pages: list[Pages] = []
        weakref.finalize(self, _trim_arena).atexit = False

    @property
    def bytes(self) -> int:
        """How much memory they take."""
        return sum(map(len, self.pages))

    def take(self, size: int) -> tuple[Pages | ArenaPages, memoryview]:
        """Pages, and of them this many bytes; when nobody uses those any more the pages come back."""
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
        """Give back pages, those that wait longest first, until no more than `size` bytes are left."""
        while self.pages and self.bytes > size:
            self.pages.pop(0)


def _of_arena(size: int, owner: Arena) -> tuple[ArenaPages, memoryview]:
    with in_arena(torch.device("cpu")):
        block = torch.empty(size, dtype=torch.uint8)
    pages, view = ArenaPages(block, owner), memoryview(block.numpy().data)
    weakref.finalize(view, _gone, pages).atexit = False  # until then they are there
    return pages, view


def _gone(_pages: ArenaPages) -> None:
    """The last use of these pages has ended; their block goes with it."""


def _trim_arena() -> None:
    found = loaded()
    if found is not None:
        found.trim()
