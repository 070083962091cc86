"""The CPU memory limit of a step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from .memory import new_blocks_on_own_pages, resident_bytes, trim_heap

_NEW_SHARE = 0.7  # share of a piece of work that does not fit into the heap's free pages
_OP_SHARE = 0.25  # share of a piece of work that the gradient of one op may add
_WORTH_SHARE = 0.1  # share of a piece of work by which the heap must grow before it is trimmed again
_FIRST, _EVERY = 3, 32  # the heap is trimmed before the first 3 steps and then every 32 steps, to measure the baseline
_GROWN_SHARE = 0.02  # share of a limit; if more is allocated between two steps, the baseline is measured again


class RecordedTiles(Protocol):
    """An object that holds graphs of tiles, by row and column, in the order in which they were recorded."""

    recorded: dict[Any, Any]


class ProcessBaseline:
    """Measures the memory that a process uses outside its steps.

    The measurement trims the heap, and the next step must fault its pages in again, which takes a third of the time of
    small networks. So it runs before the first steps, when gradients and optimizer states are allocated, then only
    occasionally or after the process has grown since the last step.

    Memory that libraries retain from a step still counts towards the limit of the next step.
    """

    def __init__(self) -> None:
        self.bytes = self.first = self.held = self.after = self.steps = 0

    def before(self, limit: int, held: int, gradients: int, spare: int, left: int) -> int:
        """The baseline in bytes, measured at the beginning of a step.

        Args:
            limit: limit of the step in bytes.
            held: bytes of the limit that are in use before every step.
            gradients: bytes of existing gradients, which the step accumulates into; not every step has them.
            spare: bytes of free pages of the arena.
            left: bytes of the limit that libraries retain from one step to the next.
        """
        if held != self.held:
            self.held, self.steps = held, 0
        grown = resident_bytes() - gradients - self.after > _GROWN_SHARE * limit
        if grown or self.steps < _FIRST or self.steps % _EVERY == 0:
            trim_heap()
            self.bytes = resident_bytes() - spare - held - gradients
        # Memory outside the steps may have been freed since the last measurement.
        self.bytes = min(self.bytes, resident_bytes() - spare - held - gradients)
        self.first = self.bytes if self.steps == 0 else min(self.first, self.bytes)
        self.steps += 1
        return max(self.first, self.bytes - left)


_baseline = ProcessBaseline()


class MemoryLimit:
    """Limits the CPU memory that a step adds to this process.

    Memory that was returned to the system is slow to obtain again. So free pages of the C library's heap are returned
    only when necessary. The heap may hold twice the bytes in use, because
    aligned blocks do not fit into holes of their own size. Near the limit the heap stops growing: blocks that fit no
    hole get separate pages. If the bytes in use alone exceed the limit, graphs that are retained for the backward are
    dropped, the one that is needed last first, and their tiles are recomputed.

    Args:
        limit: bytes for `held` and everything allocated from now on.
        held: bytes of the limit that are in use already.
        left: bytes of the limit that are in use from the second step on.
        work: bytes that are allocated between two calls of `keep`.
        strict: whether to trim the heap.
        gradients: bytes of the limit that existing gradients take.

    Attributes:
        near: whether at most one further piece of work fitted at the last call of `keep`.
        dropped: number of graphs that were dropped.
    """

    def __init__(self, limit: int, held: int, left: int, work: int, strict: bool, gradients: int = 0):
        self.work, self.strict, self.near = work, strict, False
        spare = self._spare()
        if strict:
            self._base = _baseline.before(limit, held, gradients, spare, left)
        else:
            self._base = resident_bytes() - spare - held - gradients
        self.bytes = self._base + limit
        self.dropped = 0
        self._alone = False
        self._before = 0  # bytes of this process at the last call of `keep`
        self._worth = 0  # resident bytes above which trimming the heap may free pages
        self._kept: list[weakref.ref[RecordedTiles]] = []  # weak: hooks of their graphs refer to this object

    def _spare(self) -> int:
        """Known bytes that this process holds but does not use."""
        return 0

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes may be allocated at once."""
        return not self.strict or resident_bytes() - self._spare() + size <= self.bytes

    def share(self, limit: int, work: int, strict: bool) -> None:
        """Extend this limit to another forward whose backward runs together with the earlier ones.

        Args:
            limit, work, strict: the arguments of its own limit; the larger values apply.
        """
        self.bytes, self.work = max(self.bytes, self._base + limit), max(self.work, work)
        self.strict = self.strict or strict

    def keep(self) -> None:
        """Return unused memory if the next piece of work would exceed the limit.

        Once the heap has grown to its working size, it serves a piece from blocks that the last piece freed. So the
        heap is trimmed only if the next piece would not fit with the same growth as the last one.
        """
        used = resident_bytes()
        over = used + int(_NEW_SHARE * self.work) - self.bytes
        self.near = used + int((1 + _NEW_SHARE) * self.work) > self.bytes
        grows = min(int(_NEW_SHARE * self.work), max(0, used - self._before))
        if self.strict and over > 0 and used + grows > self.bytes:
            trim_heap()
        self._before = resident_bytes()

    def watch(self, new: int | None = None) -> None:
        """Called before an op: stops the growth of the heap near the limit, and enforces the limit.

        Args:
            new: upper bound of the bytes that the op allocates; None if unknown, as for the gradient of an op.
        """
        if not self.strict:
            return
        used, room = resident_bytes(), self.bytes - (int(_OP_SHARE * self.work) if new is None else new)
        if self._alone != (used > room):
            self._alone = used > room
            new_blocks_on_own_pages(self._alone)
        if used > max(room, self._worth):
            trim_heap()
            used = resident_bytes()
            while used > self.bytes and self._drop():
                trim_heap()
                used = resident_bytes()
            self._worth = used + int(_WORTH_SHARE * self.work)

    def _drop(self) -> bool:
        """Drop a retained graph; returns whether there was one."""
        for kept in filter(None, (ref() for ref in self._kept)):
            if kept.recorded:
                del kept.recorded[next(iter(kept.recorded))]
                self.dropped += 1
                return True
        return False

    def may_drop(self, kept: RecordedTiles) -> None:
        """Allow dropping these graphs when memory is short, the oldest first, because pass 2 needs it last."""
        self._kept.append(weakref.ref(kept))

    def must_keep(self, kept: RecordedTiles) -> None:
        """Forbid dropping these graphs from now on."""
        self._kept = [ref for ref in self._kept if ref() is not kept]

    def _backward_follows(self) -> bool:
        """Whether the backward of some stage has not started yet."""
        return any(ref() is not None for ref in self._kept)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Context of a pass, after which the heap may grow freely again."""
        try:
            yield
        finally:
            if self._alone:
                self._alone = False
                new_blocks_on_own_pages(False)
            self._worth, _baseline.after = 0, resident_bytes()
