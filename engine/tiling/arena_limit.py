"""What a step may take of this process's memory on the CPU, where its blocks come from the arena."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from .arena import Arena, Counts
from .memory import resident_bytes, trim_heap
from .memory_limit import Kept, MemoryLimit
from .page_pool import PagePool

_STEP_SHARE, _MOST_SHARE = 0.05, 0.1  # of what is predicted, by which that is raised at a time, and at most
_LITTLE_SHARE = 0.25  # of what the arena holds: after so much was given back, and got again, it was too little


@dataclass
class Predicted:
    """What a network's steps should do with, from one step to the next.

    Attributes:
        planned: bytes of a limit, as the plan says.
        more: bytes besides, where those have proved too little.
        returned: bytes that steps have given back since there were more.
    """

    planned: int
    more: int = 0
    returned: int = 0

    @property
    def bytes(self) -> int:
        """Of a limit, so many."""
        return self.planned + self.more

    def gave_back(self, returned: int, held: int) -> None:
        """So many bytes more went back, of an arena that holds so many."""
        self.returned += returned
        if self.returned > _LITTLE_SHARE * held:
            most = int(_MOST_SHARE * self.planned)
            self.more, self.returned = min(most, self.more + int(_STEP_SHARE * self.planned)), 0


class ArenaLimit(MemoryLimit):
    """A limit that the arena itself keeps: before it takes more pages than there is room for, it gives free ones back.

    It is held to what the plan predicts, in which few pages are free. Pages that go back have to be got again, at ten
    times what it takes to write them: where steps give back much, that was too little, and they may have a little more
    of the limit; a tenth at most, so that what is held is about what was predicted. What is in use is known without
    giving anything back; where that is beyond the limit, the heap is trimmed, and graphs that are kept for the backward
    go.

    Args:
        limit, held, left, work, page_pool, strict: as of any limit.
        predicted: what of the limit the network's steps should do with.
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
        predicted: Predicted,
        arena: Arena,
    ):
        self.arena = arena
        super().__init__(limit, held, left, work, page_pool, strict)
        self._predicted, self._limit = predicted, limit
        self._returned = arena.counts().returned
        self._gradients, self._after = held, 0  # bytes that come when a pass has ended, outside of the arena
        self._trimmed = False

    def _spare(self) -> int:
        return self.arena.counts().spare

    def keep(self) -> None:
        used, counts = resident_bytes(), self.arena.counts()
        self.near = used - counts.spare + 2 * self.work > self.bytes
        self._heed(used, counts)

    def watch(self, new: int | None = None) -> None:
        if not self.strict:
            return
        used, counts = resident_bytes(), self.arena.counts()
        most = self.bytes - (new or 0)
        if used - counts.spare > most:
            used, counts = self._lighten(most)
        self._heed(used, counts)

    def _lighten(self, most: int) -> tuple[int, Counts]:
        """Bring what is in use down to so many bytes, as far as may be; bytes of this process and counts after it."""
        if not self._trimmed:
            trim_heap()
            self._trimmed = True
        while True:
            used, counts = resident_bytes(), self.arena.counts()
            if used - counts.spare <= most or not self._drop():
                return used, counts

    def must_keep(self, kept: Kept) -> None:
        super().must_keep(kept)
        self._after = self._gradients

    def _heed(self, used: int, counts: Counts, after: int = 0) -> None:
        """Tell the arena how much more this process may hold, with `after` bytes that will come elsewhere.

        Args:
            used: bytes of this process now, free pages among them.
            counts: of the arena now.
        """
        if not self.strict:
            return
        self._predicted.gave_back(counts.returned - self._returned, counts.held)
        self._returned = counts.returned
        more = max(0, self._limit - self._predicted.bytes)
        self.arena.room(self.bytes - more - used - after)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self._trimmed = False
        try:
            with super().watched():
                yield
                self._heed(resident_bytes(), self.arena.counts(), self._after)
        finally:
            self.arena.no_limit()
