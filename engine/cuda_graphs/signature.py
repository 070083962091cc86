"""Signatures of tiles: equivalent tiles do the same work on windows, halos and blocks of the same sizes.

Rows and columns are separable, so a tile is described by the signatures of its row and its column. A signature contains
everything on which a tile's computation depends along that axis, relative to the tile's own blocks: their lengths, the
window of each op, its padding, and the halos. This holds for ops that read a `Window` (or a `Chain` of two); other ops
depend on their position in the image.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from ..lowering.geometry import Access, Chain, Window
from ..tiling.halos import Rect, area, shift, split
from ..tiling.stage import TiledStage

Signature = tuple[Any, ...]

# Ops that depend on the position if a window is padded: one divides by counts that are computed on the host, the other
# reads the opposite border.
_AT_BORDERS = frozenset({"avg_pool2d", "circular"})


def translates(tiled: TiledStage) -> bool:
    """Whether tiles of a stage can be equivalent at all."""
    accesses = (access for local in tiled.stage.locals for both in local.reads.values() for access in both)
    return not tiled.random and all(isinstance(access, (Window, Chain)) for access in accesses)


def axis_signature(tiled: TiledStage, axis: int, step: int) -> Signature | None:
    """The signature of a row (axis 0) or column (axis 1) of tiles; None if the work depends on the position."""
    schedule = (tiled.rows, tiled.cols)[axis]
    found: list[Any] = []
    for value in schedule.frontier:
        start, end = schedule.block(value, step)
        halos = (*schedule.halo_in(value, step), *schedule.halo_out(value, step)) if value in tiled.with_halo else ()
        found.append((end - start, *(n - start for n in halos)))
    for local in tiled.stage.locals:
        outputs = schedule.block(local.op.outputs[0], step)
        for value, both in local.reads.items() if outputs[0] < outputs[1] else ():
            access, start = both[axis], schedule.block(value, step)[0]
            padding = _padding(access, *outputs)
            if any(padding) and local.op.name in _AT_BORDERS:
                return None
            found.append((*(n - start for n in access.span(*outputs)), *padding))
    for reduction in tiled.stage.reductions:
        start, end = schedule.block(reduction.value, step)
        if reduction.grid is not None and start < end and not reduction.grid[axis].every:
            found.append(tuple(reduction.grid[axis].parts(start, end)))
    return tuple(found)


def _padding(access: Access, lo: int, hi: int) -> tuple[int, ...]:
    if isinstance(access, Chain):
        return *access.second.padding(lo, hi), *access.first.padding(*access.second.span(lo, hi))
    assert isinstance(access, Window)
    return access.padding(lo, hi)


class Outline:
    """The inputs and outputs of the tiles of one kind, as rectangles that `place` translates to a tile.

    Attributes:
        windows: the source windows, (source, rectangle).
        entering: by (side, value), the part of a halo that windows of the tile read.
        leaving: by (side, value), the part of a halo that the tile passes on.
    """

    def __init__(self, tiled: TiledStage, i: int, j: int, taken: Container[int]):
        """`taken` are the maps that are read outside local ops."""
        self.tiled, self.i, self.j = tiled, i, j
        self.windows: list[tuple[int, Rect]] = []
        self.entering: dict[tuple[str, int], Rect] = {}
        self.leaving: dict[tuple[str, int], Rect] = {}
        for source in tiled.stage.sources:
            for rect in tiled.source_rects(source, i, j, source in taken):
                self.windows.append((source, self.relative("source", source, rect)))
        for local in tiled.stage.locals:
            if tiled.computes(local.op.outputs[0], i, j):
                for value in local.reads:
                    if value not in tiled.stage.sources:
                        self._read(value, tiled.reads(local, value, i, j))
        for value in tiled.with_halo:
            for side, _, halo in tiled.hands_on(value, i, j):
                self.leaving[side, value] = self.relative(side, value, halo)

    def _read(self, value: int, window: Rect) -> None:
        block = self.tiled.block(value, self.i, self.j)
        above, left, _ = split(window, block)
        row, col = self.tiled.rows.halo_in(value, self.i)[0], self.tiled.cols.halo_in(value, self.j)[0]
        for side, part in (("above", shift(above, row, 0)), ("left", shift(left, block[0], col))):
            if area(part):
                part = self.relative(side, value, part)
                known = self.entering.get((side, value), part)
                lows, highs = zip(known[::2], part[::2], strict=True), zip(known[1::2], part[1::2], strict=True)
                (top, left_), (bottom, right) = (min(pair) for pair in lows), (max(pair) for pair in highs)
                self.entering[side, value] = (top, bottom, left_, right)

    def _corner(self, side: str, value: int, i: int, j: int) -> tuple[int, int]:
        """The origin of tile (i, j): sources are whole, rows from above have the full width, other halos neither."""
        row = self.tiled.rows.block(value, i)[0] if side == "source" else 0
        return row, self.tiled.cols.block(value, j)[0] if side != "left" else 0

    def relative(self, side: str, value: int, rect: Rect) -> Rect:
        """A rectangle of the first tile relative to its origin; the inverse of `place`."""
        return shift(rect, *self._corner(side, value, self.i, self.j))

    def place(self, side: str, value: int, rect: Rect, i: int, j: int) -> Rect:
        """Translate a rectangle of `windows` ("source"), `entering` or `leaving` ("above", "left") to tile (i, j)."""
        row, col = self._corner(side, value, i, j)
        return shift(rect, -row, -col)
