"""What is taken from maps while the tiles go by: sums and maxima over the image, and their gradients' way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .carries import Rect
from .ops import Reduction


class Accumulator:
    """The value of one reduction, gathered tile by tile.

    Sums run in float64 over partial sums in at least float32. Maxima remember each tile's own maximum, so that the
    gradient goes to the elements that stock PyTorch picks: all equal ones in equal parts, or the first in raster order.
    """

    def __init__(self, reduction: Reduction, dtype: torch.dtype):
        self.reduction, self.dtype = reduction, dtype
        self.total: Tensor | None = None
        self.maxima: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # per tile: its maximum, and count or place

    def add(self, i: int, j: int, block: Tensor, rect: Rect, width: int) -> None:
        """Take in the block of tile (i, j), which lies at `rect` of a map of this width."""
        reduction = self.reduction
        if reduction.kind == "sum":
            part = self.partial(block).to(torch.float64)
            self.total = part if self.total is None else self.total.add_(part)
            return
        if reduction.first_only:
            part, place = F.adaptive_max_pool2d(block, 1, return_indices=True)
            columns = rect[3] - rect[2]
            note = (place // columns + rect[0]) * width + place % columns + rect[2]
        else:
            part = self.partial(block)
            note = (block == part).sum(reduction.dims, keepdim=True)
        self.total = part if self.total is None else torch.maximum(self.total, part)
        self.maxima[i, j] = part, note

    def partial(self, block: Tensor) -> Tensor:
        """The block's own share of the reduction, kept dimensions and all."""
        reduction = self.reduction
        if reduction.kind == "sum":
            wide = torch.float32 if block.dtype in (torch.float16, torch.bfloat16) else block.dtype
            return block.sum(reduction.dims, keepdim=True, dtype=wide)
        if reduction.first_only:
            return F.adaptive_max_pool2d(block, 1)
        return block.amax(reduction.dims, keepdim=True)

    def value(self) -> Tensor:
        """The reduction's value as stock PyTorch returns it."""
        assert self.total is not None
        value = (self.total / self.reduction.count if self.reduction.count != 1 else self.total).to(self.dtype)
        return value if self.reduction.keepdim else value.squeeze(self.reduction.dims)

    def shares(self) -> dict[tuple[int, int], Tensor]:
        """For a maximum: per tile, the factor on the gradient of the tile's own maximum."""
        tops = {tile: part == self.total for tile, (part, _) in self.maxima.items()}
        notes = {tile: note for tile, (_, note) in self.maxima.items()}
        if self.reduction.first_only:
            far = torch.iinfo(torch.int64).max
            places = {tile: torch.where(top, notes[tile], far) for tile, top in tops.items()}
            first = torch.stack(list(places.values())).amin(0)
            return {tile: place == first for tile, place in places.items()}
        counts = {tile: (top * notes[tile]).double() for tile, top in tops.items()}
        total = torch.stack(list(counts.values())).sum(0)
        return {tile: count / total for tile, count in counts.items()}


@dataclass
class Target:
    """Something taken from a map: a reduction, or (accumulator None) the map itself; and its gradient in pass 2."""

    accumulator: Accumulator | None
    grad: Tensor | None
    shares: dict[tuple[int, int], Tensor]


Targets = dict[int, list[Target]]
