"""Reductions to a grid: rows and columns are divided into cells (`geometry.Cells`), and each cell gives a value.

    6 x 6      pyramid pooling (PSP): adaptive pooling to a fixed grid, whose cells may share a row or column
    H x 1      over the width alone: strip pooling, coordinate attention, mean(3)
    1 x W      over the height alone

A tile contributes to the cells that it overlaps, and receives their gradient. The result grows with the image only if
it has a value per row or per column.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..lowering.geometry import Cells
from ..lowering.ops import Axes, Reduction
from ..lowering.stages import ProgramStage
from .halos import Rect
from .reduce import Accumulator


def new_accumulator(reduction: Reduction, stage: ProgramStage) -> Accumulator:
    """A new accumulator for a reduction of a stage."""
    dtype = stage.program.values[reduction.outputs[0]].dtype
    if reduction.grid is None:
        return Accumulator(reduction, dtype)
    return GridAccumulator(reduction, dtype, stage.maps.axes[reduction.value], stage.maps.size(reduction.value)[1])


class GridAccumulator(Accumulator):
    """Accumulates a reduction to a grid tile by tile.

    For a maximum whose gradient goes to the first of equal elements, it stores the index of that element per cell. If
    all equal elements share the gradient, it stores the maxima of each tile.
    """

    def __init__(self, reduction: Reduction, dtype: torch.dtype, axes: Axes, width: int):
        super().__init__(reduction, dtype)
        assert reduction.grid is not None
        self.grid, self.axes, self.width = reduction.grid, axes, width
        self.pixels: Tensor | None = None  # moments: pixels accumulated per cell
        self.places: Tensor | None = None  # maxima: index of the first in row-major order, per cell
        self.rects: dict[tuple[int, int], Rect] = {}

    @property
    def has_shares(self) -> bool:
        return bool(self.rects)

    def part_of(self, whole: Tensor, rect: Rect | None) -> Tensor:
        if rect is None:  # `whole` is the part already
            return whole
        for axis, cells, span in zip(self.axes, self.grid, (rect[:2], rect[2:]), strict=True):
            start, end = cells.touched(*span)
            whole = whole.narrow(axis, start, end - start)
        return whole

    def _like(self, part: Tensor, fill: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """A tensor shaped like `part`, but with one value per cell."""
        shape = list(part.shape)
        for axis, cells in zip(self.axes, self.grid, strict=True):
            shape[axis] = cells.count
        return torch.full(shape, fill, dtype=dtype, device=part.device)

    # -- a block's part -------------------------------------------------------------------------------------------

    def share(
        self, block: Tensor, moments: tuple[Tensor, ...] | None = None, rect: Rect | None = None, look: bool = True
    ) -> tuple[Tensor, ...]:
        """Values of a block per cell: sums; means and squared deviations; or maxima with their counts or indices."""
        assert rect is not None
        reduction = self.reduction
        if reduction.kind == "moments":
            block = block.to(torch.promote_types(block.dtype, torch.float32))
            mean = block.mean(reduction.dims, keepdim=True)
            return mean, (block - mean).square_().sum(reduction.dims, keepdim=True)
        if reduction.kind == "sum":
            return (self._sums(block, rect),)
        if reduction.first_only:
            return self._maxima(block, rect)
        part = block.amax(reduction.dims, keepdim=True)
        return part, (block == part).sum(reduction.dims, keepdim=True)

    def partial(self, block: Tensor, rect: Rect | None = None) -> Tensor:
        assert rect is not None
        if self.reduction.kind == "sum":
            return self._sums(block, rect)
        return self._maxima(block, rect)[0] if self.reduction.first_only else block.amax(self.reduction.dims, True)

    def _sums(self, block: Tensor, rect: Rect) -> Tensor:
        wide = torch.float32 if block.dtype in (torch.float16, torch.bfloat16) else block.dtype
        for axis, cells, lo in zip(self.axes, self.grid, (rect[0], rect[2]), strict=True):
            block = _cell_sums(block, axis, cells, lo, wide)
        rest = [d for d in self.reduction.dims if d not in self.axes]
        return block.sum(rest, keepdim=True, dtype=wide) if rest else block.to(wide)

    def _maxima(self, block: Tensor, rect: Rect) -> tuple[Tensor, Tensor]:
        """The maximum of each cell and the flat index of its first element.

        The index counts in rows of the whole map, from the block's corner.
        """
        (h, w), (rows, cols), (top, _, left, _) = self.axes, self.grid, rect
        if rows.every or cols.every:
            dim, cells, lo = (w, cols, left) if rows.every else (h, rows, top)
            parts = cells.parts(lo, lo + block.shape[dim])
            found = [block.narrow(dim, start, end - start).max(dim, keepdim=True) for start, end in parts]
            value = torch.cat([values for values, _ in found], dim)
            along = torch.cat([place + start for (_, place), (start, _) in zip(found, parts, strict=True)], dim)
            other = h if rows.every else w
            across = torch.arange(block.shape[other], device=block.device)
            across = across.view([-1 if d == other else 1 for d in range(block.dim())])
            row, column = (across, along) if rows.every else (along, across)
        else:
            row_parts = rows.parts(top, top + block.shape[h])
            col_parts = cols.parts(left, left + block.shape[w])
            lines = [[_first_maximum(block, *high, *wide) for wide in col_parts] for high in row_parts]
            value, row, column = (
                torch.cat([torch.cat([cell[n] for cell in line], w) for line in lines], h) for n in range(3)
            )
        return value, row * self.width + column

    # -- of all tiles ---------------------------------------------------------------------------------------------

    def merge(self, i: int, j: int, share: tuple[Tensor, ...], rect: Rect, width: int) -> None:
        reduction, part = self.reduction, share[0]
        if reduction.kind == "sum":
            if self.total is None:
                self.total = self._like(part, 0)
            self.part_of(self.total, rect).add_(part)
        elif reduction.kind == "max":
            self._merge_maxima(i, j, share, rect)
        else:
            self._merge_moments(part, share[1], rect)

    def _merge_maxima(self, i: int, j: int, share: tuple[Tensor, ...], rect: Rect) -> None:
        part, note = share
        if self.total is None or self.places is None:
            self.total = self._like(part, -torch.inf, part.dtype)
            self.places = self._like(part, torch.iinfo(torch.int64).max, torch.int64)
        total, places = self.part_of(self.total, rect), self.part_of(self.places, rect)
        self.rects[i, j] = rect
        if self.reduction.first_only:
            note = note + (rect[0] * self.width + rect[2])
            better = (part > total) | ((part == total) & (note < places)) | (part.isnan() & ~total.isnan())
            places.copy_(torch.where(better, note, places))
        else:
            self.maxima[i, j] = share[0], share[1]
        total.copy_(torch.maximum(part, total))

    def _merge_moments(self, mean: Tensor, deviations: Tensor, rect: Rect) -> None:
        if self.total is None or self.deviations is None or self.pixels is None:
            self.total, self.deviations, self.pixels = (self._like(mean, 0) for _ in range(3))
        own = (self.part_of(t, rect) for t in (self.total, self.deviations, self.pixels))
        total, deviated, seen = own
        # Each row (or column) is a cell: the block's width (or height) is its number of pixels per cell.
        pixels = rect[3] - rect[2] if self.grid[0].every else rect[1] - rect[0]
        distance, both = mean.to(torch.float64) - total, seen + pixels
        deviated.add_(deviations).add_(distance.square() * seen * pixels / both)
        total.add_(distance * pixels / both)
        seen.copy_(both)

    def gradient(
        self, x: Tensor, grads: Sequence[Tensor | None], addend: Tensor | None = None, rect: Rect | None = None
    ) -> Tensor:
        assert self.total is not None
        whole, own = self.total, [None if grad is None else self.part_of(grad, rect) for grad in grads]
        try:
            self.total = self.part_of(whole, rect)
            return super().gradient(x, own, addend)
        finally:
            self.total = whole

    def values(self) -> tuple[Tensor, ...]:
        assert self.total is not None
        reduction = self.reduction
        if self.deviations is not None and self.pixels is not None:
            found = [self.total, self.deviations / self.pixels]
        else:
            found = [self.total / reduction.count if reduction.count != 1 else self.total]
        if reduction.kind == "max" and len(reduction.outputs) > 1:  # a shard also counts the maxima
            assert self.places is not None
            first = self.places != torch.iinfo(torch.int64).max
            found.append(first if reduction.first_only else self._counts())
        dtypes = [self.dtype, self.dtype if reduction.kind == "moments" else torch.float64]
        return tuple(
            (t if reduction.keepdim else t.squeeze(reduction.dims)).to(dtype, copy=True)
            for t, dtype in zip(found, dtypes, strict=False)
        )

    def _counts(self) -> Tensor:
        """The number of elements that equal the maximum, per cell."""
        assert self.total is not None
        counts = self._like(self.total, 0)
        for tile, rect in self.rects.items():
            part, note = self.maxima[tile]
            self.part_of(counts, rect).add_((part == self.part_of(self.total, rect)) * note)
        return counts

    def shares(self) -> dict[tuple[int, int], Tensor]:
        assert self.total is not None and self.places is not None
        result = {}
        if self.reduction.first_only:
            row, column = self.places // self.width, self.places % self.width
            inside = (
                (top <= row) & (row < bottom) & (left <= column) & (column < right)
                for top, bottom, left, right in self.rects.values()
            )
            for (tile, rect), mine in zip(self.rects.items(), inside, strict=True):
                result[tile] = self.part_of(mine, rect)
            return result
        counts = self._counts()
        for tile, rect in self.rects.items():
            part, note = self.maxima[tile]
            result[tile] = (part == self.part_of(self.total, rect)) * note / self.part_of(counts, rect)
        return result


def _cell_sums(x: Tensor, dim: int, cells: Cells, lo: int, dtype: torch.dtype) -> Tensor:
    """Sums of a block over its part of each cell along one axis, on which the block begins at `lo`."""
    if cells.every:
        return x
    parts = cells.parts(lo, lo + x.shape[dim])
    # Neighbouring cells may overlap: a piece that several cells share is summed once.
    borders = sorted({border for part in parts for border in part})
    lengths = [end - start for start, end in pairwise(borders)]
    pieces = [piece.sum(dim, keepdim=True, dtype=dtype) for piece in x.split(lengths, dim)]
    place = {border: number for number, border in enumerate(borders)}
    sums = []
    for start, end in parts:
        first, *others = pieces[place[start] : place[end]]
        for other in others:
            first = first + other
        sums.append(first)
    return sums[0] if len(sums) == 1 else torch.cat(sums, dim)


def _first_maximum(block: Tensor, top: int, bottom: int, left: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of a part of a block (N, C, H, W), and the row and column of its first element in the block."""
    value, place = F.adaptive_max_pool2d(block[:, :, top:bottom, left:right], 1, return_indices=True)
    return value, place // (right - left) + top, place % (right - left) + left
