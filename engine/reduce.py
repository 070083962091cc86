"""What is taken from maps while the tiles go by: sums, maxima, moments; and the way back of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from .carries import Rect
from .ops import Reduction


class Accumulator:
    """The value of one reduction, gathered tile by tile.

    Sums run in float64 over partial sums in at least float32. Maxima remember each tile's own maximum, so that the
    gradient goes to the elements that stock PyTorch picks: all equal ones in equal parts, or the first in raster order.
    Moments are merged in float64 from each tile's mean and sum of squared deviations from it (Chan, Golub and LeVeque).
    """

    def __init__(self, reduction: Reduction, dtype: torch.dtype):
        self.reduction, self.dtype = reduction, dtype
        self.total: Tensor | None = None
        self.maxima: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # per tile: its maximum, and count or place
        self.seen = 0  # moments: pixels taken in, and below the sum of their squared deviations from the mean `total`
        self.deviations: Tensor | None = None

    def share(
        self, block: Tensor, moments: tuple[Tensor, ...] | None = None, rect: Rect | None = None
    ) -> tuple[Tensor, ...]:
        """What a block gives, wherever it lies: its sum; mean and squared deviations; maximum and count or place.

        Args:
            moments: mean and squared deviations, if they are known.
            rect: where the block lies, which a reduction to a grid asks for.
        """
        reduction = self.reduction
        if reduction.kind == "moments":
            if moments is not None:
                return tuple(part.clone() for part in moments)
            if self._by_kernel(block):
                from ..kernels.moments import moments_of_each

                return tuple(part[:, :, None, None] for part in moments_of_each(block))
            block = block.to(torch.promote_types(block.dtype, torch.float32))
            mean = block.mean(reduction.dims, keepdim=True)
            return mean, (block - mean).square_().sum(reduction.dims, keepdim=True, dtype=block.dtype)
        if reduction.kind == "sum":
            return (self.partial(block),)
        if reduction.first_only:
            return F.adaptive_max_pool2d(block, 1, return_indices=True)
        part = self.partial(block)
        return part, (block == part).sum(reduction.dims, keepdim=True)

    def merge(self, i: int, j: int, share: tuple[Tensor, ...], rect: Rect, width: int) -> None:
        """Take in what the block of tile (i, j) has given, which lies at `rect` of a map of this width.

        The tensors of the share may be written to.
        """
        if self.reduction.kind == "moments":
            mean, deviations = share
            self._merge(mean, deviations, (rect[1] - rect[0]) * (rect[3] - rect[2]))
            return
        if self.reduction.kind == "sum":
            part = share[0].to(torch.float64)
            self.total = part if self.total is None else self.total.add_(part)
            return
        part, note = share
        if self.reduction.first_only:
            columns = rect[3] - rect[2]
            note = (note // columns + rect[0]) * width + note % columns + rect[2]
        self.total = part if self.total is None else torch.maximum(self.total, part)
        self.maxima[i, j] = part, note

    def _merge(self, mean: Tensor, deviations: Tensor, pixels: int) -> None:
        mean, deviations = mean.to(torch.float64), deviations.to(torch.float64)
        if self.total is None or self.deviations is None:
            self.seen, self.total, self.deviations = pixels, mean, deviations
            return
        both = self.seen + pixels
        distance = mean - self.total
        self.deviations.add_(deviations).addcmul_(distance, distance, value=self.seen * pixels / both)
        self.total.add_(distance, alpha=pixels / both)
        self.seen = both

    def pull(
        self, x: Tensor, grads: Sequence[Tensor | None], addend: Tensor | None = None, rect: Rect | None = None
    ) -> Tensor:
        """What a part of the map gets of the gradients of mean and variance: dmean/n + 2 (x - mean) dvar/n + addend."""
        assert self.total is not None
        count, (dmean, dvar) = self.reduction.count, grads
        if dvar is None:
            assert dmean is not None
            part = (dmean / count).to(x.dtype).expand_as(x)
            return part if addend is None else part + addend
        if self._by_kernel(x):
            return self._pull_by_kernel(x, dmean, dvar, addend)
        slope = 2 * dvar / count
        pulled = torch.sub(x, self.total.to(slope.dtype)).mul_(slope)
        if dmean is not None:
            pulled.add_(dmean / count)
        if addend is not None:
            pulled.add_(addend)
        return pulled.to(x.dtype)

    def _by_kernel(self, block: Tensor) -> bool:
        """Whether `gigamorph.kernels` computes moments of this map."""
        return block.dim() == 4 and self.reduction.dims == (2, 3) and kernels.enabled(block.device)

    def _pull_by_kernel(self, x: Tensor, dmean: Tensor | None, dvar: Tensor, addend: Tensor | None) -> Tensor:
        from ..kernels.moments import moments_backward

        assert self.total is not None
        parts = []
        for n in range(x.shape[0]):
            mean, dm, dv = (None if t is None else t[n].flatten() for t in (self.total, dmean, dvar))
            own = None if addend is None else addend[n : n + 1]
            parts.append(moments_backward(x[n : n + 1], mean, dm, dv, self.reduction.count, own))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def partial(self, block: Tensor, rect: Rect | None = None) -> Tensor:
        """The block's own share of the reduction, kept dimensions and all."""
        reduction = self.reduction
        if reduction.form is not None:
            return reduction.form(block)
        if reduction.kind == "sum":
            wide = torch.float32 if block.dtype in (torch.float16, torch.bfloat16) else block.dtype
            return block.sum(reduction.dims, keepdim=True, dtype=wide)
        if reduction.first_only:
            return F.adaptive_max_pool2d(block, 1)
        return block.amax(reduction.dims, keepdim=True)

    @property
    def has_shares(self) -> bool:
        """Whether tiles take back different parts of the gradient: `shares`."""
        return bool(self.maxima)

    def part_of(self, whole: Tensor, rect: Rect | None) -> Tensor:
        """Of a tensor like the result (kept dimensions and all), the part that a block at `rect` has a share in."""
        return whole

    def values(self) -> tuple[Tensor, ...]:
        """The reduction's values as stock PyTorch returns them: tensors that the caller may change."""
        assert self.total is not None
        if self.deviations is not None:
            return self.total.to(self.dtype, copy=True), (self.deviations / self.seen).to(self.dtype)
        value = (self.total / self.reduction.count if self.reduction.count != 1 else self.total).to(self.dtype)
        found = [value]
        if len(self.reduction.outputs) > 1:  # a band's maximum: how many elements have it
            first = self.reduction.first_only
            counts = [(part == self.total) * (1 if first else note) for part, note in self.maxima.values()]
            found.append(torch.stack(counts).sum(0, dtype=torch.float64))
        return tuple((t if self.reduction.keepdim else t.squeeze(self.reduction.dims)).clone() for t in found)

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
    """Something taken from a map: a reduction, or (accumulator None) the map itself; and its gradients in pass 2."""

    accumulator: Accumulator | None
    grads: tuple[Tensor | None, ...]
    shares: dict[tuple[int, int], Tensor]

    @property
    def of_block(self) -> bool:
        """Whether the gradient is one of the block itself, not of something reduced from it."""
        return self.accumulator is None or self.accumulator.reduction.kind == "moments"


Targets = dict[int, list[Target]]
