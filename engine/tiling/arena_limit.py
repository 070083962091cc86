"""The CPU memory limit of a step whose blocks come from the arena."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .arena import Arena
from .memory import mapped_bytes, new_blocks_on_own_pages, resident_bytes, trim_heap
from .memory_limit import MemoryLimit, RecordedTiles

_SLACK = (
    0.05  # extra share of the predicted bytes that a step may hold: with fewer free pages it faults in pages repeatedly
)


class ArenaLimit(MemoryLimit):
    """A limit that the arena enforces: it returns free pages to the system before it exceeds the limit.

    The arena may hold the bytes that the plan predicts plus a small slack, so that few pages are free. Its bytes in use
    are known without returning pages. If they exceed the limit, the heap is trimmed, then graphs that are retained for
    the backward are dropped.

    Args:
        limit, held, left, work, strict, gradients: see `MemoryLimit`.
        predicted: bytes of the limit that the plan predicts for the network's steps.
        arena: the arena of this process.
        calls: bytes of the limit that autograd allocates between two passes, outside the arena.
        mapped: bytes of the limit for file-backed maps that tiles read and write.
    """

    def __init__(
        self,
        limit: int,
        held: int,
        left: int,
        work: int,
        strict: bool,
        predicted: int,
        arena: Arena,
        gradients: int = 0,
        calls: int = 0,
        mapped: int = 0,
    ):
        self.arena = arena
        self._mapped = mapped and mapped_bytes() + mapped  # includes the pages of files that are resident already
        super().__init__(limit, held, left, work, strict, gradients)
        self._beyond = max(0, limit - int((1 + _SLACK) * predicted))  # bytes of the limit that the arena must not hold
        # Bytes that are allocated outside the arena after a pass.
        self._calls, self._gradients, self._after = calls, held, 0
        self._trimmed = False
        self._set_allowance(resident_bytes())

    def _spare(self) -> int:
        return self.arena.counts().spare

    def keep(self) -> None:
        used, counts = resident_bytes(), self.arena.counts()
        self.near = used - counts.spare + 2 * self.work > self.bytes
        self._set_allowance(used)

    def watch(self, new: int | None = None) -> None:
        if not self.strict:
            return
        used, counts = resident_bytes(), self.arena.counts()
        most = self.bytes - (new or 0)
        if used - counts.spare > most:
            used = self._reduce_use(most)
        self._set_allowance(used)

    def _reduce_use(self, most: int) -> int:
        """Reduce the bytes in use to `most` if possible; returns the resident bytes of this process afterwards."""
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

    def _set_allowance(self, used: int, after: int = 0) -> None:
        """Set how many more bytes the arena may hold.

        Args:
            used: resident bytes of this process, including free pages.
            after: bytes that will be allocated outside the arena.
        """
        if self.strict:
            more = max(0, self._mapped - mapped_bytes()) if self._mapped else 0  # these become resident within an op
            self.arena.room(self.bytes - self._beyond - used - after - more)
        else:
            self.arena.no_limit()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Context of a pass. Its limit applies until the next pass: maps and gradients are allocated in between.

        Blocks allocated there return to the system as soon as they are freed; the heap would retain them.
        """
        self._trimmed = False
        if self._calls:
            new_blocks_on_own_pages(False)
        self._set_allowance(resident_bytes())
        with super().watched():
            yield
            self._set_allowance(resident_bytes(), self._after + self._calls)
        if self.strict and self._calls:
            new_blocks_on_own_pages(self._backward_follows())
