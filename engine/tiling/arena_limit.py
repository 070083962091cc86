"""What a step may take of this process's memory on the CPU, where its blocks come from the arena."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .arena import Arena
from .memory import mapped_bytes, new_blocks_on_own_pages, resident_bytes, trim_heap
from .memory_limit import MemoryLimit, RecordedTiles
from .page_pool import PagePool

_SLACK = (
    0.05  # of what is predicted, what a step may hold besides: with fewer free pages it gets the same ones over again
)


class ArenaLimit(MemoryLimit):
    """A limit that the arena itself keeps: before it takes more pages than there is room for, it gives free ones back.

    It is held to what the plan predicts and a little more, in which few pages are free. What is in use is known without
    giving anything back; where that is beyond the limit, the heap is trimmed, and graphs that are kept for the backward
    go.

    Args:
        limit, held, left, work, page_pool, strict, gradients: as of any limit.
        predicted: bytes of the limit that the network's steps should do with.
        arena: of this process.
        calls: bytes of the limit that autograd allocates between two passes, outside of the arena.
        mapped: bytes of the limit that maps in files take where tiles read and write them.
    """

    def __init__(
        self,
        limit: int,
        held: int,
        left: int,
        work: int,
        page_pool: PagePool,
        strict: bool,
        predicted: int,
        arena: Arena,
        gradients: int = 0,
        calls: int = 0,
        mapped: int = 0,
    ):
        self.arena = arena
        self._mapped = mapped and mapped_bytes() + mapped  # with all that is there of files already
        super().__init__(limit, held, left, work, page_pool, strict, gradients)
        self._beyond = max(0, limit - int((1 + _SLACK) * predicted))  # of the limit, what is not to be held
        # Bytes that come when a pass has ended, outside of the arena.
        self._calls, self._gradients, self._after = calls, held, 0
        self._trimmed = False
        self._heed(resident_bytes())

    def _spare(self) -> int:
        return self.arena.counts().spare

    def keep(self) -> None:
        used, counts = resident_bytes(), self.arena.counts()
        self.near = used - counts.spare + 2 * self.work > self.bytes
        self._heed(used)

    def watch(self, new: int | None = None) -> None:
        if not self.strict:
            return
        used, counts = resident_bytes(), self.arena.counts()
        most = self.bytes - (new or 0)
        if used - counts.spare > most:
            used = self._lighten(most)
        self._heed(used)

    def _lighten(self, most: int) -> int:
        """Bring what is in use down to so many bytes, as far as may be; bytes of this process after it."""
        if not self._trimmed:
            trim_heap()
            self._trimmed = True
        while True:
            used, counts = resident_bytes(), self.arena.counts()
            if used - counts.spare <= most or not self._drop():
                return used

    def must_keep(self, kept: RecordedTiles) -> None:
        super().must_keep(kept)
        self._after = self._gradients

    def _heed(self, used: int, after: int = 0) -> None:
        """Tell the arena how much more this process may hold, with `after` bytes that will come elsewhere.

        Args:
            used: bytes of this process now, free pages among them.
        """
        if self.strict:
            more = max(0, self._mapped - mapped_bytes()) if self._mapped else 0  # comes within an op
            self.arena.room(self.bytes - self._beyond - used - after - more)
        else:
            self.arena.no_limit()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A pass. Its limit stays in force until the next one: maps and their gradients are made between the passes.

        What calls allocate there goes back to the system as soon as it is free: the heap would keep it.
        """
        self._trimmed = False
        if self._calls:
            new_blocks_on_own_pages(False)
        self._heed(resident_bytes())
        with super().watched():
            yield
            self._heed(resident_bytes(), self._after + self._calls)
        if self.strict and self._calls:
            new_blocks_on_own_pages(self._backward_follows())
