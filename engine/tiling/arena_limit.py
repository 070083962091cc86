"""What a step may take of this process's memory on the CPU, where its blocks come from the arena."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .arena import Arena
from .memory import trim_heap, used_bytes
from .memory_limit import Kept, MemoryLimit
from .page_pool import PagePool

_STEP_SHARE = 0.05  # of what is predicted, by which that is raised at a time


class ArenaLimit(MemoryLimit):
    """A limit that the arena itself keeps: before it takes more pages than there is room for, it gives free ones back.

    It is held to what the plan predicts, in which few pages are free. Whenever a step has given back as much as there
    is, that was too little, and it may have a little more of the limit. What is in use is known without giving anything
    back; where that is beyond the limit, the heap is trimmed, and graphs that are kept for the backward go.

    Args:
        limit, held, left, work, page_pool, strict: as of any limit.
        predicted: bytes of the limit that the step should do with.
        arena: of this process.
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
    ):
        self.arena = arena
        super().__init__(limit, held, left, work, page_pool, strict)
        self._predicted, self._more = predicted, max(0, limit - predicted)
        self._returned = arena.counts().returned
        self._gradients, self._after = held, 0  # bytes that come when a pass has ended, outside of the arena
        self._trimmed = False

    def _spare(self) -> int:
        return self.arena.counts().spare

    def keep(self) -> None:
        self.near = self._in_use() + 2 * self.work > self.bytes
        self._heed()

    def watch(self, new: int | None = None) -> None:
        if not self.strict:
            return
        most = self.bytes - (new or 0)
        if self._in_use() > most and not self._trimmed:
            trim_heap()
            self._trimmed = True
        while self._in_use() > most and self._drop():
            pass
        self._heed()

    def must_keep(self, kept: Kept) -> None:
        super().must_keep(kept)
        self._after = self._gradients

    def _in_use(self) -> int:
        """Bytes of this process but the arena's free pages."""
        return used_bytes() - self.arena.counts().spare

    def _heed(self, after: int = 0) -> None:
        """Tell the arena how much more this process may hold, with `after` bytes that will come elsewhere."""
        if not self.strict:
            return
        counts = self.arena.counts()
        if counts.returned - self._returned > counts.held:
            self._returned = counts.returned
            self._more = max(0, self._more - int(_STEP_SHARE * self._predicted))
        self.arena.room(self.bytes - self._more - used_bytes() - after)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self._trimmed = False
        try:
            with super().watched():
                yield
                self._heed(self._after)
        finally:
            self.arena.no_limit()
