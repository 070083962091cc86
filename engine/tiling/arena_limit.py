"""What a step may take of this process's memory on the CPU, where its blocks come from the arena."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .arena import Arena
from .memory import trim_heap, used_bytes
from .memory_limit import MemoryLimit
from .page_pool import PagePool


class ArenaLimit(MemoryLimit):
    """A limit that the arena itself keeps: before it takes more pages than there is room for, it gives free ones back.

    What is in use is known without giving anything back. Where that is too much, the pages of maps that are gone go,
    then what the heap has, and after them graphs that are kept for the backward.

    Args:
        limit, held, left, work, page_pool, strict: as of any limit.
        arena: of this process.
    """

    def __init__(self, limit: int, held: int, left: int, work: int, page_pool: PagePool, strict: bool, arena: Arena):
        self.arena = arena
        self._trimmed = False
        super().__init__(limit, held, left, work, page_pool, strict)

    def _spare(self) -> int:
        return self.page_pool.bytes + self.arena.counts().spare

    def keep(self) -> None:
        over = self._in_use() + self.work - self.bytes
        self.near = over + self.work > 0
        self.page_pool.shrink(self.page_pool.bytes - max(0, over))
        self._heed()

    def watch(self, new: int | None = None) -> None:
        if not self.strict:
            return
        most = self.bytes - (new or 0)
        if self._in_use() > most:
            self.page_pool.shrink(self.page_pool.bytes - (self._in_use() - most))
            if self._in_use() > most and not self._trimmed:
                trim_heap()
                self._trimmed = True
            while self._in_use() > most and self._drop():
                pass
        self._heed()

    def _in_use(self) -> int:
        """Bytes of this process but the arena's free pages."""
        return used_bytes() - self.arena.counts().spare

    def _heed(self) -> None:
        """Tell the arena how much more this process may hold."""
        if self.strict:
            self.arena.room(self.bytes - used_bytes())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self._trimmed = False
        try:
            with super().watched():
                yield
        finally:
            self.arena.no_limit()
