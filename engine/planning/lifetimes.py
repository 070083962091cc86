"""Lifetimes of stored maps and their gradients in a step, and their bytes over time."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from ..capture.program import Op, Value
from ..lowering.ops import VectorOp
from ..lowering.rewrites import unvalued_runs
from ..lowering.stages import ProgramStage, StagedProgram
from .call_memory import CallMemory, call_memory
from .interstage import COPIES, LOOKS, brought, takes, value_bytes

_KEEPS_PLACES = COPIES - {"gather"}  # autograd saves only indices of these; see `interstage.COPIES`
_GIVES_ROWS_BACK = sys.platform == "linux"  # see `stored_maps.let_rows_go`


def _kept(step: Op | VectorOp | ProgramStage, taken: Sequence[int], values: Sequence[Value]) -> Sequence[int]:
    """Of the values that a step reads, those that stay resident until its backward."""
    if isinstance(step, VectorOp):
        return ()
    # Indexing by constants returns a view, which keeps the whole tensor alive.
    copies = (
        isinstance(step, Op)
        and step.name in _KEEPS_PLACES
        and not step.mutated
        and (step.name != "__getitem__" or len(step.inputs) > 1)
    )
    return [v for v in taken if not values[v].takes_grad] if copies else taken


def made_whole(staged: StagedProgram) -> frozenset[int]:
    """Vectors that recorded calls compute between the stages; `stored_peak` counts them as maps."""
    steps = (step for step in staged.steps if isinstance(step, Op))
    return frozenset(v for step in steps for v in step.outputs)


class _Lifetimes:
    """Lifetimes of stored maps and their gradients, see `stored_times`; arrays with one entry per value."""

    def __init__(self, staged: StagedProgram, wanted: Container[int]):
        steps, values = staged.steps, staged.program.values
        end = len(steps)
        made: dict[int, int] = {}
        unvalued: set[int] = set()
        state: set[int] | None = None
        for number, step in enumerate(steps):
            outputs = step.stored if isinstance(step, ProgramStage) else step.outputs
            if isinstance(step, Op) and step.name in LOOKS:
                state = set(staged.program.state()) if state is None else state
                if state.issuperset(step.inputs):
                    state.update(outputs)  # the memory of a parameter or buffer
                    outputs = ()
            if isinstance(step, ProgramStage):
                unvalued |= unvalued_runs(step, set()).keys()
            if isinstance(step, VectorOp):
                outputs = [v for v in outputs if v in staged.maps]
            made.update((v, number) for v in outputs)
        last: dict[int, int] = dict.fromkeys(staged.program.results(), end)
        held = set(last)
        readers: dict[int, list[int]] = {}
        for number, step in enumerate(steps):
            taken = [v for v in takes(step) if v in made]
            for v in taken:
                last[v] = max(last.get(v, 0), number)
                readers.setdefault(v, []).append(number)
            held.update(_kept(step, taken, values))
        split = any(stage.offsets for stage in staged.stages)
        stage_maps: Container[int] = () if split else staged.stage_maps()
        kind = values[staged.program.image].device.type
        row_by_row = kind == "cpu" and _GIVES_ROWS_BACK
        # A shard's own rows are freed after the fetch; in the backward their gradient is resident.
        maker = {v: part for part in staged.segments for v in made if made[v] in part}

        def first_read(v: int) -> float:
            """The earliest step that reads a map in its backward, until which the map is resident."""
            if v not in stage_maps or v in unvalued:
                return -1
            part = maker.get(v)
            # Inputs of a segment are saved by the segment as a whole.
            within = (next((p for p in staged.segments if r in p), None) for r in readers.get(v, ()))
            reads = (
                p.start if p is not None and p != part else r for r, p in zip(readers.get(v, ()), within, strict=True)
            )
            return min(reads, default=math.inf)

        def of_each(what: Callable[[int], Any], dtype: type) -> np.ndarray:
            return np.array([what(v) for v in made], dtype)

        # The segment that contains all uses of a map; other maps may be resident during all steps.
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
        self.is_stage = [isinstance(step, ProgramStage) for step in steps]

    def elsewhere(self) -> _Lifetimes:
        """The lifetimes if maps that only stages read are offloaded, so that they count 0 bytes.

        Values computed for a stage between the stages are resident during its forward and its backward.
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
        return _as_integers(self._bytes((self.made <= times) & ((times <= self.last) | kept)))

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
        return _as_integers(steady + np.maximum(growing, dying))

    def again(self, part: range) -> int:
        """Bytes after the recomputation of a segment, before its backward."""
        before, inside = self.made < part.start, (part.start <= self.made) & (self.made < part.stop)
        outside = before & ~self.inner & (self.first_read <= part.start)
        value = self.held & (outside | (inside & ((self.made < part.stop - 1) | self.unvalued)))
        grad = self.grown & (self.made < part.stop) & (part.stop <= self.last)
        return int(self._bytes(value) + self._bytes(grad))


def _as_integers(numbers: np.ndarray) -> list[int]:
    return numbers.astype(np.int64).tolist()


def stored_peak(staged: StagedProgram, training: bool, wanted: Container[int]) -> int:
    """The maximum of `stored_times` over a step, in bytes."""
    return _peak(stored_times(staged, training, wanted))


def stored_peaks(staged: StagedProgram, training: bool, wanted: Container[int]) -> tuple[int, int]:
    """`stored_peak` with all maps on the device, and with offloaded maps."""
    if not any(stage.stored for stage in staged.stages):
        return 0, 0
    lives = _Lifetimes(staged, wanted)
    here, away = (_peak(_times(staged, training, one, wanted)) for one in (lives, lives.elsewhere()))
    return here, away


def _peak(times: list[tuple[int, int]]) -> int:
    return max((held for _, held in times), default=0)


def stored_times(staged: StagedProgram, training: bool, wanted: Container[int]) -> list[tuple[int, int]]:
    """Bytes of stored maps, of values computed between stages, and of their gradients over a step.

    A stored map is resident from the stage that writes it to its last reader; in training until the backward of the
    first stage that reads it. Its gradient is created in the backward of its last reader and freed in that of the stage
    that wrote it. On the CPU one gradient grows row by row as the other shrinks. Values inside a segment are resident
    in the forward, and again after the segment's recomputation. Offloaded maps do not count.

    Args:
        staged: the network, divided into stages.
        training: whether there is a backward.
        wanted: the values that require a gradient.

    Returns:
        (index of the step, bytes) of the forward, then of the backward; empty without stored maps.
    """
    if not any(stage.stored for stage in staged.stages):
        return []
    lives = _Lifetimes(staged, wanted)
    return _times(staged, training, lives if staged.place == "device" else lives.elsewhere(), wanted)


def _times(staged: StagedProgram, training: bool, lives: _Lifetimes, wanted: Container[int]) -> list[tuple[int, int]]:
    steps = staged.steps
    fetched = set(lives.made.tolist()) if any(stage.offsets for stage in staged.stages) else set[int]()
    fetches = [n for n in fetched if isinstance(steps[n], VectorOp)]
    times = sorted([*(n for n, step in enumerate(steps) if isinstance(step, ProgramStage)), *fetches, len(steps)])
    values = staged.program.values
    calls = {n: call_memory(step, values, training, wanted) for n, step in enumerate(steps) if isinstance(step, Op)}
    calls = {n: one for n, one in calls.items() if one != CallMemory()}
    times = sorted({*times, *calls})
    within = {n: part for part in staged.segments for n in part}

    def kept(now: int, part: range | None = None) -> int:
        """Bytes that calls save for their backward; calls in segments count after recomputation only."""
        return sum(one.kept for n, one in calls.items() if n < now and within.get(n) in (None, part))

    found = [
        (n, held + kept(n) + (calls[n].forward + calls[n].kept if n in calls else 0))
        for n, held in zip(times, lives.forward(times, training), strict=True)
    ]
    if training:
        # A call between stages saves its inputs and creates gradients of the same size.
        backwards = sorted({*times[:-1], *(n for n, step in enumerate(steps) if isinstance(step, Op))})
        for n, held in zip(backwards, lives.backward(backwards), strict=True):
            found.append((n, held + kept(n, within.get(n)) + (calls[n].kept + calls[n].backward if n in calls else 0)))
        found += [(part.stop - 1, lives.again(part) + kept(part.stop, part)) for part in staged.segments]
    return found
