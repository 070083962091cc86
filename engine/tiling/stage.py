"""A stage: a graph cut into tiles, and the computation of one tile from its pixels and halos."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..lowering.geometry import AxisSchedule, Window, same, schedule_axis
from ..lowering.ops import Block, Local, SumOf
from ..lowering.rewrites import in_place_runs, unvalued_runs
from ..lowering.stages import Stage, readers_of
from .halos import Compose, Crop, Layout, Rect, cut


class TiledStage:
    """The stage of a graph cut into tiles of a given size: schedules, and the computation of one tile.

    Args:
        graph: the sorted program.
        tile: height and width of a tile in pixels of the largest source (the image, if that is one); any positive size.
    """

    def __init__(self, stage: Stage, tile: tuple[int, int]):
        self.stage = stage
        self.tile = tile
        self.rows = self._schedule(0, tile[0])
        self.cols = self._schedule(1, tile[1])
        self.tiles = self.rows.steps * self.cols.steps
        self.random = any(local.random for local in stage.locals)
        self.with_halo = [v for v in self.rows.frontier if v not in stage.sources and self._has_halo(v)]
        self.in_place = in_place_runs(stage, set(self.with_halo))
        self.unvalued = unvalued_runs(stage, set(self.with_halo))
        # Of a band's sources no tile reads the rows that it does not need.
        self.apportioned = {v for v in stage.sources if self._is_apportioned(v)} if stage.offsets is None else set()
        self.reductions: dict[int, list[int]] = {}
        for number, reduction in enumerate(stage.reductions):
            self.reductions.setdefault(reduction.value, []).append(number)
        self.moments = {r.value for r in stage.reductions if r.kind == "moments"}
        self.reread = self.moments & self.unvalued.keys()  # in pass 2, where they were stored in pass 1
        self.readers = readers_of(stage)
        self.reads_left = {value: len(locals) for value, locals in self.readers.items()}

    def _schedule(self, axis: int, tile: int) -> AxisSchedule:
        stage = self.stage
        reads = [(local.op.outputs, [(v, a[axis]) for v, a in local.reads.items()]) for local in stage.locals]
        sources = {value: stage.maps.size(value)[axis] for value in stage.sources}
        resident = stage.maps.resident
        if axis == 0 and stage.offsets is not None:
            consumers = [*(r.value for r in stage.reductions), *stage.stored]
            return schedule_axis(tile, stage.extent[axis], sources, reads, stage.offsets, consumers, resident)
        return schedule_axis(tile, stage.extent[axis], sources, reads, resident=resident)

    def _has_halo(self, value: int) -> bool:
        for axis in (self.rows, self.cols):
            for step in range(1, axis.steps):
                lo, hi = axis.halo_in(value, step)
                if lo < hi:
                    return True
        return False

    def _is_apportioned(self, source: int) -> bool:
        """Whether each tile reads its own block of a source and nothing else of it."""
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
        return (*self.rows.block(value, i), *self.cols.block(value, j))

    def halo_sizes(self, value: int, i: int, j: int) -> list[tuple[str, int, int]]:
        """(side, height, width) of the halos of `value` that enter tile (i, j); for "above" in full width."""
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
        """The rectangle of `value` that an op reads in tile (i, j)."""
        top, bottom, left, right = self.block(local.op.outputs[0], i, j)
        height, width = local.reads[value]
        return (*height.span(top, bottom), *width.span(left, right))

    def source_rects(self, source: int, i: int, j: int, own: bool) -> list[Rect]:
        """The rectangles of a source that tile (i, j) reads, and with `own` its own block of it."""
        rects = dict.fromkeys([self.block(source, i, j)] if own else [])
        for local in self.readers.get(source, ()):
            if self.computes(local.op.outputs[0], i, j):
                rects[self.reads(local, source, i, j)] = None
        return list(rects)

    def computes(self, value: int, i: int, j: int) -> bool:
        top, bottom, left, right = self.block(value, i, j)
        return top < bottom and left < right

    def hands_on(self, value: int, i: int, j: int) -> list[tuple[str, Rect, Rect]]:
        """The parts of tile (i, j)'s block that later tiles need: (side, rectangle of it, rectangle of the halo)."""
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
        """The maps that a gradient flows through, given the sources and vectors that want one."""
        values = self.stage.program.values
        needs = {v for v in self.stage.sources if v in wanted}
        for local in self.stage.locals:
            if any(v in needs for v in local.reads) or any(v in wanted for v in local.op.inputs):
                needs.update(v for v in local.op.outputs if values[v].takes_grad)
        return needs


def split(rect: Rect, block: Rect) -> tuple[Rect, Rect, Rect]:
    """The parts of a window that lie above the block's rows, left of its columns, and in the block."""
    top, bottom, left, right = rect
    middle = min(max(top, block[0]), bottom)
    centre = min(max(left, block[2]), right)
    return (top, middle, left, right), (middle, bottom, left, centre), (middle, bottom, centre, right)


def shift(rect: Rect, row: int, col: int) -> Rect:
    return rect[0] - row, rect[1] - row, rect[2] - col, rect[3] - col


def area(rect: Rect) -> int:
    return max(0, rect[1] - rect[0]) * max(0, rect[3] - rect[2])


@dataclass
class Halos:
    """The halos that enter one tile (or their gradients): rows from above, in full width, and columns.

    `origin` says, by side and value, where a tensor begins that holds only a part of its halo.
    """

    above: dict[int, Tensor]
    left: dict[int, Tensor]
    origin: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def place(self, side: str, value: int, rect: Rect) -> Rect:
        """A rectangle of a halo in the tensor that is here."""
        return shift(rect, *self.origin.get((side, value), (0, 0)))


class Tile:
    """One tile's computation; used by both passes, with or without autograd.

    Attributes:
        halos: what enters the tile.
        needs: the maps that a gradient flows through; empty without autograd.
        anchor: a scalar that requires a gradient and keeps the nodes of the halos in autograd's graph.
        halo_grads: where the gradients of `halos` are added, set before the tile is differentiated.
        handed_back: gradients of the halos that the tile handed on, likewise.
        alone: stored maps and their gradients are there as this tile's blocks, not whole.
        shares: what ops have computed of the moments of their outputs.
    """

    def __init__(
        self,
        tiled: TiledStage,
        i: int,
        j: int,
        pixels: Callable[[int, Rect], Tensor],
        vectors: dict[int, Tensor],
        halos: Halos,
        needs: set[int] | None = None,
    ):
        self.tiled, self.i, self.j = tiled, i, j
        self.pixels, self.vectors, self.halos = pixels, vectors, halos
        self.needs = needs or set()
        self.blocks: dict[int, Tensor] = {}
        self.source_windows: dict[tuple[int, Rect], Tensor] = {}
        self.anchor: Tensor | None = None
        self.sum_of: SumOf | None = None
        self.margins: dict[int, tuple[int, int]] = {}  # blocks that have room for rows above and columns to the left
        self.halo_grads: Halos | None = None
        self.handed_back: Halos | None = None
        self.second_pass = False  # the stored maps are there
        self.alone = False
        self.shares: dict[int, tuple[Tensor, ...]] = {}

    def window(
        self, value: int, rect: Rect, pad: tuple[int, int, int, int], fill: float | None
    ) -> tuple[Tensor, tuple[int, int, int, int]]:
        """The rectangle of `value`, padded already if it had to be put together, and the padding still missing."""
        tiled = self.tiled
        if value in tiled.stage.sources:
            if (value, rect) not in self.source_windows:
                self.source_windows[value, rect] = self.pixels(value, rect)
            return self.source_windows[value, rect], pad
        if not area(rect):  # the outputs of this tile lie wholly in the padding
            info, shape = tiled.stage.program.values[value], list(tiled.stage.maps.shape(value))
            shape[tiled.axes(value)[0]], shape[tiled.axes(value)[1]] = rect[1] - rect[0], rect[3] - rect[2]
            return torch.empty(shape, dtype=info.dtype, device=info.device), pad
        block = tiled.block(value, self.i, self.j)
        above, left, inside = split(rect, block)
        if area(inside) == area(rect):
            tensor = self.blocks[value]
            if inside != block:
                part = tiled.axes(value), shift(inside, block[0], block[2])
                tensor = Crop.apply(tensor, *part) if tensor.requires_grad else cut(tensor, *part)
            return tensor, pad
        axes = tiled.axes(value)
        parts: list[tuple[Rect, Tensor, Rect]] = []
        sinks: list[Callable[[Tensor], None]] = []
        sources = (
            (above, "above", tiled.rows.halo_in(value, self.i)[0], 0),
            (left, "left", block[0], tiled.cols.halo_in(value, self.j)[0]),
        )
        for part, side, row, col in sources:
            if area(part):
                source = shift(part, row, col)
                place = self.halos.place(side, value, source)
                parts.append((shift(part, rect[0], rect[2]), getattr(self.halos, side)[value], place))
                sinks.append(partial(self._add_to_halo, side, value, source))
        own = (shift(inside, rect[0], rect[2]), shift(inside, block[0], block[2])) if area(inside) else None
        padding, missing = ((0, 0, 0, 0), pad) if fill is None else (pad, (0, 0, 0, 0))
        tensor = self.blocks[value] if own else None
        room = self.margins.get(value, (0, 0)) if own and fill is None else (0, 0)
        in_margin = room[0] >= block[0] - rect[0] and room[1] >= block[2] - rect[2] and value in self.margins
        layout = Layout(
            axes, rect[1] - rect[0], rect[3] - rect[2], padding, fill or 0.0, parts, own, bool(own) and in_margin
        )
        if value in self.needs:
            return Compose.apply(self.anchor, tensor, layout, sinks), missing  # pyright: ignore
        return layout.compose(tensor), missing

    def _add_to_halo(self, side: str, value: int, rect: Rect, grad: Tensor) -> None:
        assert self.halo_grads is not None
        place = self.halo_grads.place(side, value, rect)
        cut(getattr(self.halo_grads, side)[value], self.tiled.axes(value), place).add_(grad)

    def run(self, local: Local) -> tuple[Tensor, ...]:
        """The output blocks of one op in this tile."""
        output = local.op.outputs[0]
        rows, cols = self.tiled.rows.block(output, self.i), self.tiled.cols.block(output, self.j)
        pad = (0, 0, 0, 0)
        env = self.vectors
        windows = []
        for value, (height, width) in local.reads.items():
            lacks = (0, 0, 0, 0)
            if isinstance(height, Window) and isinstance(width, Window):
                lacks = (*height.padding(*rows), *width.padding(*cols))
            env[value], lacks = self.window(value, self.tiled.reads(local, value, self.i, self.j), lacks, local.fill)
            pad = (max(pad[0], lacks[0]), max(pad[1], lacks[1]), max(pad[2], lacks[2]), max(pad[3], lacks[3]))
            windows.append(value)
        margin = self.margin(output) if local.leaves_room else (0, 0)
        run = self.tiled.in_place.get(output, local.run)
        if self.second_pass:
            run = self.tiled.unvalued.get(output, run)
        shares = self.shares if output in self.tiled.moments and not self.second_pass else None
        result = run(env, Block(rows, cols, pad, self.sum_of, margin, shares))
        if margin != (0, 0):
            self.margins[output] = margin
        for value in windows:
            del env[value]
        return result

    def margin(self, value: int) -> tuple[int, int]:
        """How many rows above and columns to the left of a block the windows of this tile need."""
        block = self.tiled.block(value, self.i, self.j)
        windows = [
            self.tiled.reads(local, value, self.i, self.j)
            for local in self.tiled.readers.get(value, ())
            if self.tiled.computes(local.op.outputs[0], self.i, self.j)
        ]
        windows = [rect for rect in windows if area(rect)]
        above = max((block[0] - rect[0] for rect in windows), default=0)
        left = max((block[2] - rect[2] for rect in windows), default=0)
        return max(above, 0), max(left, 0)

    def hands_on(self, value: int) -> list[tuple[str, Rect, Rect]]:
        """The parts of a block that later tiles need: (side, rectangle of the block, rectangle of the halo)."""
        return self.tiled.hands_on(value, self.i, self.j)

    def add_handed_back(self, value: int, grad: Tensor) -> None:
        """Add to a block's gradient what later tiles have handed back for it."""
        assert self.handed_back is not None
        axes = self.tiled.axes(value)
        for side, own, halo in self.hands_on(value):
            place = self.handed_back.place(side, value, halo)
            cut(grad, axes, own).add_(cut(getattr(self.handed_back, side)[value], axes, place))

    def reach(self, consumers: Container[int]) -> tuple[set[int], set[int]]:
        """Values whose block in this tile is needed for gradients, and those they reach through an op of this tile."""
        tiled, i, j = self.tiled, self.i, self.j
        values = tiled.stage.program.values
        reached: set[int] = set()
        through: set[int] = set()
        read: set[int] = set()  # for their values alone
        for local in reversed(tiled.stage.locals):
            if not tiled.computes(local.op.outputs[0], i, j):
                continue
            for value in local.op.outputs:
                if value in consumers:
                    through.add(value)
                # Random numbers are drawn whoever reads them, or those after them would be others.
                if (
                    value in through
                    or value in read
                    or local.random
                    or (value in self.needs and value in tiled.with_halo and self.hands_on(value))
                ):
                    reached.add(value)
            if any(v in reached for v in local.op.outputs):
                flows = any(v in reached and values[v].takes_grad for v in local.op.outputs)
                for value in local.reads:
                    window = tiled.reads(local, value, i, j)
                    if area(split(window, tiled.block(value, i, j))[2]):  # not halos alone
                        (through if flows else read).add(value)
        return reached, through
