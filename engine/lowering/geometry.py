"""Integer algebra of one image axis: the rows that a new block makes computable, and the rows that must be stored.

Rows and columns follow the same rules, one axis at a time. An axis of `size` is cut into steps (tiles); after step i
the first `frontier[i]` indices of a value are known. An op reads its input through an `Access`: output index o needs
input indices first(o) .. last(o). Then

    frontier of the output = the number of outputs whose inputs are all known, or all of them once the input is complete
    first_needed of a value = the first index that any consumer reads in its next block

and the rows [first_needed, frontier) are the halo.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Protocol


class Access(Protocol):
    """How one output axis reads one input axis. All methods are monotone in their argument."""

    @property
    def size_in(self) -> int: ...

    @property
    def size_out(self) -> int: ...

    def ready(self, frontier: int) -> int:
        """Number of outputs computable from the first `frontier` inputs."""
        ...

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        """Half-open range of inputs that the outputs [lo, hi) read, clipped to the axis; hi > lo."""
        ...


@dataclass(frozen=True, slots=True)
class _Strided:
    """Sizes and parameters of a kernel that moves along one axis."""

    size_in: int
    size_out: int
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Extent of the dilated kernel minus one."""
        return self.dilation * (self.kernel - 1)


@dataclass(frozen=True, slots=True)
class Window(_Strided):
    """Output o reads inputs o*stride - pad + dilation*t for t in 0 .. kernel-1; indices outside are padding.

    `pad` is the padding before the axis and may be negative (a crop). Convolution, pooling, padding, cropping and
    strided slicing are all windows; a pointwise op is the window with kernel 1, stride 1, pad 0.
    """

    def ready(self, frontier: int) -> int:
        if frontier >= self.size_in:
            return self.size_out
        if frontier <= 0:
            return 0
        return min(max((frontier + self.pad - self.reach - 1) // self.stride + 1, 0), self.size_out)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        start = min(max(lo * self.stride - self.pad, 0), self.size_in)
        return start, max(start, min((hi - 1) * self.stride - self.pad + self.reach + 1, self.size_in))

    def padding(self, lo: int, hi: int) -> tuple[int, int]:
        """Rows of padding before and after the clipped input range of the outputs [lo, hi)."""
        most = (hi - lo - 1) * self.stride + self.reach + 1  # the outputs of a band may read padding only
        return (
            min(max(0, self.pad - lo * self.stride), most),
            min(max(0, (hi - 1) * self.stride - self.pad + self.reach + 1 - self.size_in), most),
        )

    def counts(self, lo: int, hi: int, padding: bool) -> list[int]:
        """Number of inputs that each of the outputs [lo, hi) reads, with or without those in the padding."""
        low, high = (-self.pad, self.size_in + self.pad) if padding else (0, self.size_in)
        starts = [o * self.stride - self.pad for o in range(lo, hi)]
        return [min(start + self.kernel, self.size_in + self.pad, high) - max(start, low) for start in starts]


@dataclass(frozen=True, slots=True)
class Chain:
    """Two successive windows; the map between them is computed again where two tiles need it."""

    first: Window
    second: Window

    @property
    def size_in(self) -> int:
        return self.first.size_in

    @property
    def size_out(self) -> int:
        return self.second.size_out

    def ready(self, frontier: int) -> int:
        return self.second.ready(self.first.ready(frontier))

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        return self.first.span(*self.second.span(lo, hi))


@dataclass(frozen=True, slots=True)
class Gather:
    """Output o reads the inputs sources[o] .. last[o] (sources[o] alone if `last` is None); neither ever decreases.

    Nearest and bilinear upsampling.
    """

    size_in: int
    size_out: int
    sources: tuple[int, ...]
    last: tuple[int, ...] | None = None

    def ready(self, frontier: int) -> int:
        if frontier >= self.size_in:
            return self.size_out
        return bisect_left(self.last or self.sources, frontier)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        return self.sources[lo], (self.last or self.sources)[hi - 1] + 1


@dataclass(frozen=True, slots=True)
class TransposedWindow(_Strided):
    """Input i reaches the outputs i*stride - pad + dilation*t for t in 0 .. kernel-1 (a transposed convolution).

    Outputs that no input reaches (a kernel smaller than the stride, output padding) read a neighbour.
    """

    def ready(self, frontier: int) -> int:
        if frontier >= self.size_in:
            return self.size_out
        return min(max(frontier * self.stride - self.pad, 0), self.size_out)

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        end = min((hi - 1 + self.pad) // self.stride + 1, self.size_in)
        return max(0, min(-((self.reach - lo - self.pad) // self.stride), end - 1)), end


@dataclass(frozen=True, slots=True)
class Mirror:
    """Padding that repeats the axis's own values: `pad` before the axis, and after it up to `size_out`.

    By `mode`, the padding is the mirror image without the outermost index ("reflect") or with it ("symmetric"), or the
    outermost index repeated ("replicate").
    """

    size_in: int
    size_out: int
    pad: int
    mode: str = "reflect"

    @property
    def after(self) -> int:
        """Padding after the axis."""
        return self.size_out - self.size_in - self.pad

    def source(self, output: int) -> int:
        """The input that an output repeats."""
        i = output - self.pad
        last = self.size_in - 1
        if self.mode == "replicate":
            return min(max(i, 0), last)
        if self.mode == "symmetric":
            i = -1 - i if i < 0 else i
            return 2 * last + 1 - i if i > last else i
        return last - abs(last - abs(i))

    def reach(self, outside: int) -> int:
        """Distance from the outermost index of the input that is read `outside` steps beyond it."""
        return {"replicate": 0, "symmetric": max(outside - 1, 0)}.get(self.mode, outside)

    def ready(self, frontier: int) -> int:
        if frontier >= self.size_in:
            return self.size_out
        first = self.reach(max(self.pad, 0))  # the input of the outermost mirrored output
        return min(frontier + self.pad, self.size_out) if frontier > first else 0

    def span(self, lo: int, hi: int) -> tuple[int, int]:
        # The mirrored ends are read backwards: a block includes the inputs of later outputs at its end.
        start = min(max(lo - self.pad, 0), self.size_in - 1 - self.reach(max(self.after, 0)))
        end = max(hi - self.pad, 1 + self.reach(self.pad) if lo < self.pad else 1)
        return max(start, 0), min(end, self.size_in)


def same(size: int) -> Window:
    """The access of a pointwise op."""
    return Window(size, size)


def repeated(size: int) -> Window:
    """The access of an op that reads the only index of an axis at every output."""
    return Window(1, size, stride=0)


@dataclass(frozen=True, slots=True)
class Cells:
    """An axis cut into `count` cells as in adaptive pooling.

    Cell u has the indices from floor(u size / count) to ceil((u + 1) size / count); neighbours may share an index.

    Args:
        size: the size of the whole axis.
        count: the number of cells.
        first: the index of the whole axis at which the reduced map begins (a band's own rows).
    """

    size: int
    count: int
    first: int = 0

    @property
    def every(self) -> bool:
        """Whether each index is a separate cell."""
        return self.count == self.size

    def span(self, cell: int) -> tuple[int, int]:
        """The half-open range of a cell's indices in the reduced map."""
        return cell * self.size // self.count - self.first, -(-(cell + 1) * self.size // self.count) - self.first

    def touched(self, lo: int, hi: int) -> tuple[int, int]:
        """The half-open range of cells with some of the indices [lo, hi); hi > lo."""
        return (lo + self.first) * self.count // self.size, -(-(hi + self.first) * self.count // self.size)

    def parts(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """For each touched cell, its indices among [lo, hi), counted from `lo`."""
        spans = (self.span(cell) for cell in range(*self.touched(lo, hi)))
        return [(max(start, lo) - lo, min(end, hi) - lo) for start, end in spans]


@dataclass(frozen=True)
class AxisSchedule:
    """Frontiers and halos of every value along one axis.

    `frontier[v][i]` indices of value v are known after step i; `first_needed[v][i]` is the first index that is still
    needed when step i begins. Step i computes the block [frontier[v][i-1], frontier[v][i]); the first block begins at
    `start[v]` (0 if missing).
    """

    steps: int
    frontier: Mapping[int, Sequence[int]]
    first_needed: Mapping[int, Sequence[int]]
    start: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def halos(self) -> frozenset[int]:
        """The values of which a step passes indices to the next."""
        spans = ((value, self.halo_in(value, step)) for value in self.frontier for step in range(1, self.steps))
        return frozenset(value for value, (lo, hi) in spans if lo < hi)

    def known(self, value: int, step: int) -> int:
        """The end of the indices of `value` that are known when `step` begins."""
        return self.frontier[value][step - 1] if step else self.start.get(value, 0)

    @cached_property
    def blocks(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        """The blocks of every value by step: each tile asks for each of them many times."""
        return {v: list(pairwise([self.start.get(v, 0), *ends])) for v, ends in self.frontier.items()}

    def block(self, value: int, step: int) -> tuple[int, int]:
        """The indices of `value` that become known in `step` (may be empty)."""
        return self.blocks[value][step]

    def halo_in(self, value: int, step: int) -> tuple[int, int]:
        """The indices of `value` that earlier steps pass to `step`."""
        known = self.known(value, step)
        return min(self.first_needed[value][step], known), known

    def halo_out(self, value: int, step: int) -> tuple[int, int]:
        """The indices of `value` that `step` passes on."""
        known = self.frontier[value][step]
        if step + 1 == self.steps:
            return known, known
        return min(self.first_needed[value][step + 1], known), known


Reads = Sequence[tuple[Sequence[int], Sequence[tuple[int, Access]]]]


def needed(targets: Mapping[int, tuple[int, int]], reads: Reads) -> dict[int, tuple[int, int]]:
    """The indices of every value that the targets need, without values of which nothing is needed.

    Args:
        targets: values and half-open ranges of them.
        reads: for every local op in order: its output values and (input value, access) pairs.
    """
    found: dict[int, tuple[int, int]] = {}

    def add(value: int, lo: int, hi: int) -> None:
        if lo < hi:
            old = found.get(value, (lo, hi))
            found[value] = min(lo, old[0]), max(hi, old[1])

    for value, (lo, hi) in targets.items():
        add(value, lo, hi)
    for outputs, inputs in reversed(reads):
        for other in [v for v in outputs if v in found]:
            for value in outputs:  # an op gives all its outputs
                add(value, *found[other])
        if outputs[0] in found:
            for value, access in inputs:
                add(value, *access.span(*found[outputs[0]]))
    return found


def schedule_axis(
    tile: int,
    size: int,
    sources: Mapping[int, int],
    reads: Reads,
    offsets: Mapping[int, tuple[int, int]] | None = None,
    targets: Sequence[int] | None = None,
    resident: Container[int] = (),
) -> AxisSchedule:
    """Run the frontier rule over a program for one axis.

    Args:
        tile: number of indices in a step, of an axis of `size`.
        size: the axis that is cut into tiles.
        sources: the values that exist from the beginning, and their sizes; each is cut in the same proportions.
        reads: for every local op in order: its output values and (input value, access) pairs.
        offsets: for sources that are a part of an axis: the first index, and the size of the whole axis.
        targets: the values that are wanted; only their dependencies are computed. None for everything.
        resident: sources that are complete from the beginning, so no op waits for them. An op that reads nothing else
            advances with the tiles.
    """
    ends = [min(size, (i + 1) * tile) for i in range(max(1, -(-size // tile)))]
    sizes = dict(sources) | {out: inputs[0][1].size_out for outputs, inputs in reads for out in outputs}
    frontier = _frontiers(ends, size, sizes, sources, reads, offsets or {}, resident)
    start = dict.fromkeys(frontier, 0)
    if targets is not None:
        need = needed({value: (0, sizes[value]) for value in targets}, reads)
        start = {value: need.get(value, (0, 0))[0] for value in frontier}
        sizes = {value: need.get(value, (0, 0))[1] for value in frontier}
        frontier = {v: [min(max(end, start[v]), sizes[v]) for end in known] for v, known in frontier.items()}
        busy = _busy(start, frontier)
        frontier = {v: known[busy] for v, known in frontier.items()}
        ends = ends[busy]
    return AxisSchedule(len(ends), frontier, _first_needed(len(ends), sizes, reads, frontier, start), start)


def _frontiers(
    ends: Sequence[int],
    size: int,
    sizes: Mapping[int, int],
    sources: Mapping[int, int],
    reads: Reads,
    offsets: Mapping[int, tuple[int, int]],
    resident: Container[int],
) -> dict[int, list[int]]:
    """The number of known indices of every value after each step; `ends` are the ends of steps on the cut axis."""
    frontier: dict[int, list[int]] = {}
    for value, own in sources.items():
        first, whole = offsets.get(value, (0, own))
        frontier[value] = [min(max(-(-end * whole // size) - first, 0), own) for end in ends]
    for outputs, inputs in reads:
        waits = [(v, access) for v, access in inputs if v not in resident]
        for out in outputs:
            frontier[out] = (
                [min(access.ready(frontier[v][i]) for v, access in waits) for i in range(len(ends))]
                if waits
                else [-(-end * sizes[out] // size) for end in ends]
            )
    return frontier


def _busy(start: Mapping[int, int], frontier: Mapping[int, Sequence[int]]) -> slice:
    """The steps from the first to the last in which anything becomes known; at least one."""
    before = [tuple(start.values()), *zip(*frontier.values(), strict=True)]
    busy = [step for step in range(len(before) - 1) if before[step] != before[step + 1]] or [0]
    return slice(busy[0], busy[-1] + 1)


def _first_needed(
    steps: int, sizes: Mapping[int, int], reads: Reads, frontier: Mapping[int, Sequence[int]], start: Mapping[int, int]
) -> dict[int, list[int]]:
    """The first index of every value that is still needed when each step begins; its size if none is."""
    consumers: dict[int, list[tuple[int, Access]]] = {value: [] for value in frontier}
    for outputs, inputs in reads:
        for value, access in inputs:
            consumers[value].append((outputs[0], access))
    first_needed: dict[int, list[int]] = {}
    for value, users in consumers.items():
        first_needed[value] = []
        for step in range(steps):
            need_from = sizes[value]
            for user, access in users:
                done = frontier[user][step - 1] if step else start[user]
                if done < sizes[user]:
                    need_from = min(need_from, access.span(done, done + 1)[0])
            first_needed[value].append(need_from)
    return first_needed
