"""What a step may take of this process's memory on the CPU."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from .memory import new_blocks_on_own_pages, resident_bytes, trim_heap
from .page_pool import PagePool

_NEW_SHARE = 0.7  # of a piece of work, what does not find room among the heap's free pages
_OP_SHARE = 0.25  # of a piece of work, what the gradient of one op may add
_WORTH_SHARE = 0.1  # of a piece of work, what the heap should have gained before it gives back once more
_FIRST, _EVERY = 3, 32  # steps before which the heap gives back, to see what else there is
_GROWN_SHARE = 0.02  # of a limit, what may come into being between two steps before that is looked at again


class RecordedTiles(Protocol):
    """What has graphs of tiles, by their place, in the order in which they were made."""

    recorded: dict[Any, Any]


class ProcessBaseline:
    """What a process holds besides its steps.

    To see it, the heap has to give back what a step has left, whose pages the next one then has to get again: for small
    networks a third of their time. So that is done before the first steps, where gradients and what an optimizer keeps
    come into being, and after that now and then, or where more has come since the last step.

    Libraries keep some of what a step took, which is no less the step's for being there when the next one begins.
    """

    def __init__(self) -> None:
        self.bytes = self.first = self.held = self.after = self.steps = 0

    def before(self, limit: int, held: int, gradients: int, spare: int, left: int) -> int:
        """These bytes, at the beginning of a step.

        Args:
            limit: of the step.
            held: what it holds already, at the beginning of each.
            gradients: those of steps before, which it adds to: they come and go.
            spare: bytes of pages that wait for what needs them.
            left: bytes of the limit that libraries keep from one step to the next, as far as they hold them yet.
        """
        if held != self.held:
            self.held, self.steps = held, 0
        grown = resident_bytes() - gradients - self.after > _GROWN_SHARE * limit
        if grown or self.steps < _FIRST or self.steps % _EVERY == 0:
            trim_heap()
            self.bytes = resident_bytes() - spare - held - gradients
        self.bytes = min(self.bytes, resident_bytes() - spare - held - gradients)  # less, if something else has gone
        self.first = self.bytes if self.steps == 0 else min(self.first, self.bytes)
        self.steps += 1
        return max(self.first, self.bytes - left)


_baseline = ProcessBaseline()


class MemoryLimit:
    """Keeps what a step adds to this process within a limit, on the CPU.

    Memory that goes back to the system costs time to get again. So what nothing uses goes back only where it is needed:
    first the pages of maps that are gone, then those of the C library's heap, which may hold as much as is in use once
    more (its aligned blocks do not fit into holes of their own size). Near the limit the heap grows no further: what
    finds no hole in it gets pages of its own, and the process holds what is in use. If that is too much itself, graphs
    that are kept for the backward go, the one that is needed last first; its tile is then computed again.

    Args:
        limit: bytes for `held` and all that is added from now on.
        held: bytes of the limit that are in use already.
        left: bytes of the limit that are in use from the second step on.
        work: bytes that are allocated at a time between two calls of `keep`.
        page_pool: pages of maps that are gone.
        strict: whether the heap gives back what it has; else only the spare pages go.
        gradients: bytes of the limit that gradients of steps before take.

    Attributes:
        near: whether there was no room for more than one further piece of work at the last call of `keep`.
        dropped: how many graphs had to go.
    """

    def __init__(
        self, limit: int, held: int, left: int, work: int, page_pool: PagePool, strict: bool, gradients: int = 0
    ):
        self.page_pool, self.work, self.strict, self.near = page_pool, work, strict, False
        spare = self._spare()
        if strict:
            self._base = _baseline.before(limit, held, gradients, spare, left)
        else:
            self._base = resident_bytes() - spare - held - gradients
        self.bytes = self._base + limit
        self.dropped = 0
        self._alone = False
        self._before = 0  # bytes of this process at the last call of `keep`
        self._worth = 0  # bytes of this process from which on the heap may have something to give back
        self._kept: list[weakref.ref[RecordedTiles]] = []  # weak: their graphs have hooks that lead here

    def _spare(self) -> int:
        """Bytes that this process holds and nobody uses, as far as that is known."""
        return self.page_pool.bytes

    def has_room(self, size: int) -> bool:
        """Whether so many bytes may come at once."""
        return not self.strict or resident_bytes() - self._spare() + size <= self.bytes

    def share(self, limit: int, work: int, strict: bool) -> None:
        """Hold a further forward to the same memory, whose backward comes together with those before it.

        Args:
            limit, work, strict: as of its own limit; the larger ones count.
        """
        self.bytes, self.work = max(self.bytes, self._base + limit), max(self.work, work)
        self.strict = self.strict or strict

    def keep(self) -> None:
        """Give back what nothing uses if the process holds more than it should before the next piece of work.

        The heap serves a piece from what the last one has freed, once it has grown as large as pieces need: it gives
        back where the next piece would not fit if it made the process grow as the last one did.
        """
        used = resident_bytes()
        over = used + int(_NEW_SHARE * self.work) - self.bytes
        self.near = used + int((1 + _NEW_SHARE) * self.work) > self.bytes
        if over > 0:
            self.page_pool.shrink(self.page_pool.bytes - over)
            grows = min(int(_NEW_SHARE * self.work), max(0, used - self._before))
            if self.strict and resident_bytes() + grows > self.bytes:
                trim_heap()
        self._before = resident_bytes()

    def watch(self, new: int | None = None) -> None:
        """Before an op: keep the heap from growing near the limit, and see that it is not exceeded.

        Args:
            new: bytes that the op makes at most; None where that is not known, as of an op's gradient.
        """
        if not self.strict:
            return
        used, room = resident_bytes(), self.bytes - (int(_OP_SHARE * self.work) if new is None else new)
        if self._alone != (used > room):
            self._alone = used > room
            new_blocks_on_own_pages(self._alone)
        if used > max(room, self._worth):
            self.page_pool.shrink(self.page_pool.bytes - (used - room))
            trim_heap()
            used = resident_bytes()
            while used > self.bytes and self._drop():
                trim_heap()
                used = resident_bytes()
            self._worth = used + int(_WORTH_SHARE * self.work)

    def _drop(self) -> bool:
        """Let a kept graph go; whether there was one."""
        for kept in filter(None, (ref() for ref in self._kept)):
            if kept.recorded:
                del kept.recorded[next(iter(kept.recorded))]
                self.dropped += 1
                return True
        return False

    def may_drop(self, kept: RecordedTiles) -> None:
        """These graphs may go where memory is short: the earlier pass 1 has made them, the later they are needed."""
        self._kept.append(weakref.ref(kept))

    def must_keep(self, kept: RecordedTiles) -> None:
        """They may not any more."""
        self._kept = [ref for ref in self._kept if ref() is not kept]

    def _backward_follows(self) -> bool:
        """Whether there are stages whose backward has not begun."""
        return any(ref() is not None for ref in self._kept)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A pass, after which the heap may grow again as it likes."""
        try:
            yield
        finally:
            if self._alone:
                self._alone = False
                new_blocks_on_own_pages(False)
            self._worth, _baseline.after = 0, resident_bytes()
