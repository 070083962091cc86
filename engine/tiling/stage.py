"""A stage divided into tiles: the schedules of blocks and halos, and the rectangles that each tile reads."""

from __future__ import annotations

import math
from collections.abc import Container, Hashable

from ..lowering.geometry import Access, AxisSchedule, Window, same, schedule_axis
from ..lowering.ops import Local
from ..lowering.rewrites import in_place_runs, unvalued_runs
from ..lowering.stages import ProgramStage, private_maps, readers_of
from .halos import Rect, area, shift

Schedules = dict[Hashable, AxisSchedule]
_Reads = tuple[tuple[int, int], tuple[int, int]]  # along one axis: the span read, the padding around it


class TiledStage:
    """A stage divided into tiles of a given size.

    Args:
        stage: the stage.
        tile: (height, width) of a tile in pixels of the largest source (the image, if it is a source); any positive
            size.
        schedules: a cache of schedules, shared by the stages of a network.
    """

    def __init__(self, stage: ProgramStage, tile: tuple[int, int], schedules: Schedules | None = None):
        self.stage = stage
        self.tile = tile
        self._schedules = {} if schedules is None else schedules
        self.rows = self._schedule(0, tile[0])
        self.cols = self._schedule(1, tile[1])
        self.tiles = self.rows.steps * self.cols.steps
        self.random = any(local.random for local in stage.locals)
        halos = self.rows.halos | self.cols.halos
        self.with_halo = [v for v in self.rows.frontier if v not in stage.sources and v in halos]
        self.in_place = in_place_runs(stage, set(self.with_halo))
        self.unvalued = unvalued_runs(stage, set(self.with_halo))
        # Tiles of a shard skip the rows of its sources that it does not need.
        self.apportioned = {v for v in stage.sources if self._is_apportioned(v)} if stage.offsets is None else set()
        self.reductions: dict[int, list[int]] = {}
        for number, reduction in enumerate(stage.reductions):
            self.reductions.setdefault(reduction.value, []).append(number)
        self.moments = {r.value for r in stage.reductions if r.kind == "moments"}
        self.reread = self.moments & self.unvalued.keys()  # pass 2 reads the stored maps
        self.readers = readers_of(stage)
        self.gathered = {local.gathers.value: local.gathers for local in stage.locals if local.gathers is not None}
        self.unshared_gradients = self._unshared_gradients()
        self.reads_left = {value: len(locals) for value, locals in self.readers.items()}
        self._bytes: dict[int, int] = {}  # of one position, by value
        self._reads: dict[tuple[int, int], tuple[list[_Reads], list[_Reads]]] = {}  # by (output, value)

    def _schedule(self, axis: int, tile: int) -> AxisSchedule:
        stage = self.stage
        reads = tuple((local.op.outputs, tuple((v, a[axis]) for v, a in local.reads.items())) for local in stage.locals)
        sources = {value: stage.maps.size(value)[axis] for value in stage.sources}
        resident = stage.maps.resident
        if axis == 0 and stage.offsets is not None:
            consumers = [*(r.value for r in stage.reductions), *stage.stored]
            return schedule_axis(tile, stage.extent[axis], sources, reads, stage.offsets, consumers, resident)
        # The axis is part of the key: callers distinguish rows and columns by their schedules, even of a square.
        key = (axis, tile, stage.extent[axis], tuple(sources.items()), reads)
        if key not in self._schedules:
            self._schedules[key] = schedule_axis(tile, stage.extent[axis], sources, reads, resident=resident)
        return self._schedules[key]

    def _unshared_gradients(self) -> set[int]:
        """Maps whose gradient in a tile is a tensor that shares its memory with no other."""
        found, private = set(self.gathered), private_maps(self.stage)
        for local in reversed(self.stage.locals):
            passes = found.issuperset(local.op.outputs)
            for value in private.intersection(local.reads):
                if len(self.readers[value]) == 1 and (
                    value in local.memory.fresh_grads or (passes and value in local.memory.reused_grads)
                ):
                    found.add(value)
        return found

    def _is_apportioned(self, source: int) -> bool:
        """Whether each tile reads exactly its own block of a source."""
        for local in self.stage.locals:
            if source in local.reads:
                output = local.op.outputs[0]
                if any(access != same(access.size_in) for access in local.reads[source]) or any(
                    list(axis.frontier[output]) != list(axis.frontier[source]) for axis in (self.rows, self.cols)
                ):
                    return False
        return True

    def axes(self, value: int) -> tuple[int, int]:
        return self.stage.maps.axes[value]

    def block(self, value: int, i: int, j: int) -> Rect:
        """The rectangle of `value` that tile (i, j) computes; may be empty."""
        return self.rows.blocks[value][i] + self.cols.blocks[value][j]

    def halo_sizes(self, value: int, i: int, j: int) -> list[tuple[str, int, int]]:
        """(side, height, width) of the halos of `value` that enter tile (i, j); "above" has the full width."""
        sizes = []
        if i < self.rows.steps and j < self.cols.steps:
            lo, hi = self.rows.halo_in(value, i)
            if lo < hi:
                sizes.append(("above", hi - lo, self.stage.maps.size(value)[1]))
            top, bottom = self.rows.block(value, i)
            lo, hi = self.cols.halo_in(value, j)
            if lo < hi and top < bottom:
                sizes.append(("left", bottom - top, hi - lo))
        return sizes

    def reads(self, local: Local, value: int, i: int, j: int) -> Rect:
        """The rectangle of `value` that an op reads in tile (i, j), if the tile computes the op."""
        rows, cols = self._by_step(local, value)
        return rows[i][0] + cols[j][0]

    def padding(self, local: Local, value: int, i: int, j: int) -> Rect:
        """(top, bottom, left, right): the padding that an op adds around that rectangle."""
        rows, cols = self._by_step(local, value)
        return rows[i][1] + cols[j][1]

    def _by_step(self, local: Local, value: int) -> tuple[list[_Reads], list[_Reads]]:
        """The spans of `value` that an op reads in each step of rows and of columns."""
        output = local.op.outputs[0]
        if (output, value) not in self._reads:
            pads = all(isinstance(access, Window) for access in local.reads[value])
            spares = local.memory.spares and value not in self.stage.sources
            height, width = (
                [
                    _read(access, block, pads, own[1] if spares else 0)
                    for block, own in zip(axis.blocks[output], axis.blocks[value], strict=True)
                ]
                for axis, access in zip((self.rows, self.cols), local.reads[value], strict=True)
            )
            self._reads[output, value] = height, width
        return self._reads[output, value]

    def source_rects(self, source: int, i: int, j: int, own: bool) -> list[Rect]:
        """The rectangles of a source that tile (i, j) reads, with `own` including the tile's own block."""
        rects = dict.fromkeys([self.block(source, i, j)] if own else [])
        for local in self.readers.get(source, ()):
            if self.computes(local.op.outputs[0], i, j):
                rects[self.reads(local, source, i, j)] = None
        return list(rects)

    def computes(self, value: int, i: int, j: int) -> bool:
        top, bottom = self.rows.blocks[value][i]
        left, right = self.cols.blocks[value][j]
        return top < bottom and left < right

    def new_bytes(self, local: Local, i: int, j: int) -> int:
        """Upper bound of the bytes that an op of tile (i, j) allocates: outputs, and windows larger than a block."""
        rects = [(v, self.block(v, i, j)) for v in local.op.outputs if v not in self.in_place]
        for value in local.reads:
            rect = self.reads(local, value, i, j)
            if value in self.stage.sources or rect != self.block(value, i, j):
                rects.append((value, rect))
        return sum(area(rect) * self._position_bytes(v) for v, rect in rects)

    def _position_bytes(self, value: int) -> int:
        """Bytes of one position of a map."""
        if value not in self._bytes:
            info = self.stage.program.values[value]
            size = math.prod(self.stage.maps.size(value))
            self._bytes[value] = math.prod(info.shape) * info.dtype.itemsize // max(1, size)
        return self._bytes[value]

    def hands_on(self, value: int, i: int, j: int) -> list[tuple[str, Rect, Rect]]:
        """The parts of tile (i, j)'s block that later tiles need.

        Returns:
            (side, rectangle of the block, rectangle of the halo) for each side.
        """
        rect = self.block(value, i, j)
        result = []
        lo, hi = self.rows.halo_out(value, i)
        own = (max(lo, rect[0]), hi, rect[2], rect[3])
        if area(own):
            result.append(("above", shift(own, rect[0], rect[2]), shift(own, lo, 0)))
        lo, hi = self.cols.halo_out(value, j)
        own = (rect[0], rect[1], max(lo, rect[2]), hi)
        if area(own):
            result.append(("left", shift(own, rect[0], rect[2]), shift(own, rect[0], lo)))
        return result

    def needs_grad(self, wanted: Container[int]) -> set[int]:
        """The maps that a gradient flows through, given the sources and vectors that require one."""
        values = self.stage.program.values
        needs = {v for v in self.stage.sources if v in wanted}
        for local in self.stage.locals:
            if any(v in needs for v in local.reads) or any(v in wanted for v in local.op.inputs):
                needs.update(v for v in local.op.outputs if values[v].takes_grad)
        return needs


def _read(access: Access, block: tuple[int, int], pads: bool, end: int) -> _Reads:
    """The span and padding that a block (may be empty) reads along an axis.

    A window is extended to `end` if that avoids a slice.
    """
    if block[0] >= block[1]:
        return (0, 0), (0, 0)
    span, padding = access.span(*block), access.padding(*block) if pads and isinstance(access, Window) else (0, 0)
    if isinstance(access, Window) and not padding[1] and span[1] < end < span[1] + access.stride:
        return (span[0], end), padding
    return span, padding
