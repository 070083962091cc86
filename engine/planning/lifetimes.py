"""When stored maps and their gradients are there in a step, and how many bytes they are then."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import numpy as np

from ..capture.program import Op, Value
from ..lowering.ops import VectorOp
from ..lowering.rewrites import unvalued_runs
from ..lowering.stages import Stage, StagedProgram
from .calls import Beside, beside
from .interstage import COPIES, LOOKS, brought, takes, value_bytes

_KEEPS_PLACES = COPIES - {"gather"}  # of what these read autograd keeps nothing but places; see `between.COPIES`
_GIVES_ROWS_BACK = sys.platform == "linux"  # see `maps.let_rows_go`


def _kept(step: Op | VectorOp | Stage, values: Sequence[Value]) -> Iterator[int]:
    """What of a step's reads is there until its backward."""
    if isinstance(step, VectorOp):
        return
    # A part of a tensor that is told by numbers keeps all of it.
    copies = (
        isinstance(step, Op)
        and step.name in _KEEPS_PLACES
        and not step.mutated
        and (step.name != "__getitem__" or len(step.inputs) > 1)
    )
    yield from (v for v in takes(step) if not copies or not values[v].takes_grad)


def made_whole(staged: StagedProgram) -> frozenset[int]:
    """Vectors that recorded calls make between the stages; `stored_peak` counts them among the maps."""
    steps = (step for step in staged.steps if isinstance(step, Op))
    return frozenset(v for step in steps for v in step.outputs)


class _Lifetimes:
    """When stored maps and their gradients are there; see `stored_peak`. Arrays of one entry for each value."""

    def __init__(self, staged: StagedProgram, wanted: Container[int]):
        steps, values = staged.steps, staged.program.values
        end = len(steps)
        made: dict[int, int] = {}
        last: dict[int, int] = dict.fromkeys(staged.program.results(), end)
        readers: dict[int, list[int]] = {}
        unvalued: set[int] = set()
        state = set(staged.program.state())
        for number, step in enumerate(steps):
            outputs = step.stored if isinstance(step, Stage) else step.outputs
            if isinstance(step, Op) and step.name in LOOKS and state.issuperset(step.inputs):
                state.update(outputs)  # the memory of a parameter or buffer
                outputs = ()
            if isinstance(step, Stage):
                unvalued |= unvalued_runs(step, set()).keys()
            if isinstance(step, VectorOp):
                outputs = [v for v in outputs if v in staged.maps]
            made.update((v, number) for v in outputs)
            for v in takes(step):
                last[v] = max(last.get(v, 0), number)
                readers.setdefault(v, []).append(number)
        split = any(stage.offsets for stage in staged.stages)
        stage_maps: Container[int] = () if split else staged.stage_maps()
        kind = values[staged.program.image].device.type
        row_by_row = kind == "cpu" and _GIVES_ROWS_BACK
        maker = {v: part for part in staged.segments for v in made if made[v] in part}
        # A shard's own rows go when what the stages read has been fetched; in the backward their gradient stands there.
        held = {v for step in steps for v in _kept(step, values)}
        held.update(staged.program.results())

        def first_read(v: int) -> float:
            """The first step in whose backward, or in one that comes after it, a map is there because it is read."""
            if v not in stage_maps or v in unvalued:
                return -1
            part = maker.get(v)
            # What goes into a segment is kept by the segment as a whole.
            within = (next((p for p in staged.segments if r in p), None) for r in readers.get(v, ()))
            reads = (
                p.start if p is not None and p != part else r for r, p in zip(readers.get(v, ()), within, strict=True)
            )
            return min(reads, default=math.inf)

        def of_each(what: Callable[[int], Any], dtype: type) -> np.ndarray:
            return np.array([what(v) for v in made], dtype)

        # The segment that alone knows a map; what others know is there through all steps.
        within = {v: part for v, part in maker.items() if last.get(v, end) < part.stop}
        self.made, self.last = of_each(made.__getitem__, np.int64), of_each(lambda v: last.get(v, end), np.int64)
        self.size = of_each(lambda v: value_bytes(values[v]), np.float64)
        self.movable = of_each(stage_maps.__contains__, bool)
        self.begin = of_each(lambda v: within[v].start if v in within else 0, np.int64)
        self.stop = of_each(lambda v: within[v].stop if v in within else end + 1, np.int64)
        self.inner, self.held = of_each(within.__contains__, bool), of_each(held.__contains__, bool)
        self.grown = self.held & of_each(lambda v: v in wanted, bool)
        self.first_read, self.unvalued = of_each(first_read, np.float64), of_each(unvalued.__contains__, bool)
        self.by_rows = self.movable & row_by_row
        self.brought = of_each(brought(staged).__contains__, bool)
        self.is_stage = [isinstance(step, Stage) for step in steps]

    def elsewhere(self) -> _Lifetimes:
        """The same where maps that stages alone read are kept elsewhere: they count nothing.

        What is made whole for a stage is here while that is computed, and in its backward.
        """
        found = copy.copy(self)
        found.size, found.held = np.where(self.movable, 0, self.size), self.held & ~self.brought
        return found

    def _bytes(self, there: np.ndarray) -> np.ndarray:
        return there @ self.size  # in float64, which is exact up to 2 ** 53

    def forward(self, now: Sequence[int], training: bool) -> list[int]:
        """Bytes while each of these steps is computed."""
        times = np.array(now)[:, None]
        kept = self.held & ~self.inner if training else False
        return _whole(self._bytes((self.made <= times) & ((times <= self.last) | kept)))

    def backward(self, now: Sequence[int]) -> list[int]:
        """Bytes while the backward of each of these steps is computed."""
        times = np.array(now)[:, None]
        there = (self.made <= times) & (self.begin <= times) & (times < self.stop)
        own = self.by_rows & np.array([self.is_stage[n] for n in now], bool)[:, None]
        ends, begins = own & (self.made == times), own & (self.last == times)
        value = there & np.where(self.held, self.first_read <= times, times <= self.last)
        grad = there & self.grown & (times <= self.last)
        gone = ends & self.unvalued & self.held  # row by row
        dying = self._bytes(value & gone) + self._bytes(grad & ends)
        growing = self._bytes(grad & begins & ~ends)
        steady = self._bytes(value & ~gone) + self._bytes(grad & ~ends & ~begins)
        return _whole(steady + np.maximum(growing, dying))

    def again(self, part: range) -> int:
        """Bytes at the end of the second computation of a segment, whose backward is about to begin."""
        before, inside = self.made < part.start, (part.start <= self.made) & (self.made < part.stop)
        outside = before & ~self.inner & (self.first_read <= part.start)
        value = self.held & (outside | (inside & ((self.made < part.stop - 1) | self.unvalued)))
        grad = self.grown & (self.made < part.stop) & (part.stop <= self.last)
        return int(self._bytes(value) + self._bytes(grad))


def _whole(numbers: np.ndarray) -> list[int]:
    return numbers.astype(np.int64).tolist()


def stored_peak(staged: StagedProgram, training: bool, wanted: Container[int]) -> int:
    """The most bytes of `stored_times`, at any time of a step."""
    return _peak(stored_times(staged, training, wanted))


def stored_peaks(staged: StagedProgram, training: bool, wanted: Container[int]) -> tuple[int, int]:
    """`stored_peak` with all maps on the device, and with those elsewhere that can be."""
    if not any(stage.stored for stage in staged.stages):
        return 0, 0
    lives = _Lifetimes(staged, wanted)
    here, away = (_peak(_times(staged, training, one, wanted)) for one in (lives, lives.elsewhere()))
    return here, away


def _peak(times: list[tuple[int, int]]) -> int:
    return max((held for _, held in times), default=0)


def stored_times(staged: StagedProgram, training: bool, wanted: Container[int]) -> list[tuple[int, int]]:
    """Bytes of stored maps, of what calls make between stages, and of their gradients, through a step.

    A stored map lives from the stage that writes it to its last reader; where a backward will follow, until the
    backward of the first stage that reads it. Its gradient comes into being in the backward of its last reader, and
    goes in that of the stage that wrote it; on the CPU the one comes as the other goes, row by row. What only a segment
    knows lives for the forward, and then again from the second computation of the segment. Maps that are kept elsewhere
    do not count.

    Args:
        wanted: the values that want a gradient.

    Returns:
        (place among the steps, bytes): those places in the forward, then in the backward. Nothing without stored maps.
    """
    if not any(stage.stored for stage in staged.stages):
        return []
    lives = _Lifetimes(staged, wanted)
    return _times(staged, training, lives if staged.place == "device" else lives.elsewhere(), wanted)


def _times(staged: StagedProgram, training: bool, lives: _Lifetimes, wanted: Container[int]) -> list[tuple[int, int]]:
    steps = staged.steps
    fetched = set(lives.made.tolist()) if any(stage.offsets for stage in staged.stages) else set[int]()
    fetches = [n for n in fetched if isinstance(steps[n], VectorOp)]
    times = sorted([*(n for n, step in enumerate(steps) if isinstance(step, Stage)), *fetches, len(steps)])
    values = staged.program.values
    calls = {n: beside(step, values, training, wanted) for n, step in enumerate(steps) if isinstance(step, Op)}
    calls = {n: one for n, one in calls.items() if one != Beside()}
    times = sorted({*times, *calls})
    within = {n: part for part in staged.segments for n in part}

    def kept(now: int, part: range | None = None) -> int:
        """What calls keep for their backward, those of segments while that is computed again."""
        return sum(one.kept for n, one in calls.items() if n < now and within.get(n) in (None, part))

    found = [
        (n, held + kept(n) + (calls[n].forward + calls[n].kept if n in calls else 0))
        for n, held in zip(times, lives.forward(times, training), strict=True)
    ]
    if training:
        # A call between stages keeps what it reads, and makes a gradient as large.
        backwards = sorted({*times[:-1], *(n for n, step in enumerate(steps) if isinstance(step, Op))})
        for n, held in zip(backwards, lives.backward(backwards), strict=True):
            found.append((n, held + kept(n, within.get(n)) + (calls[n].kept + calls[n].backward if n in calls else 0)))
        found += [(part.stop - 1, lives.again(part) + kept(part.stop, part)) for part in staged.segments]
    return found
