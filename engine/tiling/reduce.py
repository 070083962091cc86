"""Reductions of maps over the tiles (sums, maxima, moments) and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import kernels
from ..lowering.ops import Reduction
from .halos import Rect


class WideSum(torch.autograd.Function):
    """A sum of 16-bit numbers in float32; autograd's own backward would allocate a map to round the gradient."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.shape, ctx.dtype = block.shape, block.dtype
        return block.sum(dims, keepdim=True, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return grads[0].to(ctx.dtype).expand(ctx.shape), None


class Accumulator:
    """Accumulates the value of one reduction tile by tile.

    Sums are accumulated in float64 from partial sums in at least float32. For a maximum, each tile's own maximum is
    stored, so that the gradient goes to the elements that stock PyTorch picks: all equal elements share it equally, or
    the first in row-major order (of several NaN the last) gets it. Moments are merged in float64 from each tile's mean
    and sum of squared deviations (Chan, Golub and LeVeque).
    """

    def __init__(self, reduction: Reduction, dtype: torch.dtype):
        self.reduction, self.dtype = reduction, dtype
        self.total: Tensor | None = None
        self.maxima: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # per tile: its maximum, and count or index
        self.seen = 0  # moments: number of elements accumulated
        self.deviations: Tensor | None = None  # moments: sum of squared deviations from the mean `total`

    def share(
        self, block: Tensor, moments: tuple[Tensor, ...] | None = None, rect: Rect | None = None, look: bool = True
    ) -> tuple[Tensor, ...]:
        """The share of a block: its sum; its mean and squared deviations; or its maximum with the count or index.

        Args:
            moments: mean and squared deviations, if they are known.
            rect: the block's rectangle in the map, which reductions to a grid need.
            look: see `moments_of`.
        """
        reduction = self.reduction
        if reduction.kind == "moments":
            if moments is not None and not reduction.precise:
                return moments
            if self._by_kernel(block):
                from ...kernels.moments import moments_of_each

                return tuple(part[:, :, None, None] for part in moments_of_each(block))
            return moments_of(block, reduction.dims, reduction.precise, look)
        if reduction.kind == "sum":
            return (self.partial(block),)
        if reduction.first_only:
            return F.adaptive_max_pool2d(block, 1, return_indices=True)
        part = self.partial(block)
        return part, reduction.has(block, part).sum(reduction.dims, keepdim=True)

    def merge(self, i: int, j: int, share: tuple[Tensor, ...], rect: Rect, width: int) -> None:
        """Merge the share of the block of tile (i, j), which is at `rect` of a map of this width."""
        if self.reduction.kind == "moments":
            mean, deviations = share
            pixels = (rect[1] - rect[0]) * (rect[3] - rect[2])
            self._merge(mean, deviations, pixels * self.reduction.per_pixel)
            return
        if self.reduction.kind == "sum":
            part = share[0].to(torch.float64)
            self.total = part if self.total is None else self.total + part
            return
        part, note = share
        if self.reduction.first_only:
            columns = rect[3] - rect[2]
            note = (note // columns + rect[0]) * width + note % columns + rect[2]
        self.total = part if self.total is None else torch.maximum(self.total, part)
        self.maxima[i, j] = part, note

    def _merge(self, mean: Tensor, deviations: Tensor, count: int) -> None:
        if self.total is None or self.deviations is None:  # a single tile's share needs no merging
            self.seen, self.total, self.deviations = count, mean, deviations
            return
        both, mean, total = self.seen + count, mean.to(torch.float64), self.total.to(torch.float64)
        distance = mean - total
        gathered = self.deviations.to(torch.float64) + deviations
        self.deviations = gathered.addcmul_(distance, distance, value=self.seen * count / both)
        # If the distance is not finite, the means are added, so that infinities propagate as in a sum.
        self.total = torch.where(distance.isfinite(), torch.add(total, distance, alpha=count / both), total + mean)
        self.seen = both

    def gradient(
        self, x: Tensor, grads: Sequence[Tensor | None], addend: Tensor | None = None, rect: Rect | None = None
    ) -> Tensor:
        """The gradient of a part `x` of the map from those of mean and variance.

        It is dmean/n + 2 (x - mean) dvar/n + addend.
        """
        assert self.total is not None
        count, (dmean, dvar) = self.reduction.count, grads
        if dvar is None:
            assert dmean is not None
            part = (dmean / count).to(x.dtype).expand_as(x)
            return part if addend is None else part + addend
        if self._by_kernel(x):
            return self._gradient_by_kernel(x, dmean, dvar, addend)
        slope = 2 * dvar / count
        pulled = torch.sub(x, self.total.to(slope.dtype)).mul_(slope)
        if dmean is not None:
            pulled.add_(dmean / count)
        if addend is not None:
            pulled.add_(addend)
        return pulled.to(x.dtype)

    def _by_kernel(self, block: Tensor) -> bool:
        """Whether `gigamorph.kernels` computes the moments of this map."""
        plain = block.dim() == 4 and self.reduction.dims == (2, 3) and not self.reduction.precise
        return plain and kernels.enabled(block.device)

    def _gradient_by_kernel(self, x: Tensor, dmean: Tensor | None, dvar: Tensor, addend: Tensor | None) -> Tensor:
        from ...kernels.moments import moments_backward

        assert self.total is not None
        parts = []
        for n in range(x.shape[0]):
            mean, dm, dv = (None if t is None else t[n].flatten() for t in (self.total, dmean, dvar))
            own = None if addend is None else addend[n : n + 1]
            parts.append(moments_backward(x[n : n + 1], mean, dm, dv, self.reduction.count, own))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def partial(self, block: Tensor, rect: Rect | None = None) -> Tensor:
        """The block's share of the reduction, with the reduced dimensions retained."""
        reduction = self.reduction
        if reduction.form is not None:
            return reduction.form(block)
        if reduction.kind == "sum":
            if block.dtype in (torch.float16, torch.bfloat16):
                return WideSum.apply(block, reduction.dims)  # pyright: ignore[reportReturnType]
            return block.sum(reduction.dims, keepdim=True)
        if reduction.first_only:
            return F.adaptive_max_pool2d(block, 1)
        if reduction.nan_counts:
            return Largest.apply(block, reduction)  # pyright: ignore[reportReturnType]
        return block.amax(reduction.dims, keepdim=True)

    @property
    def has_shares(self) -> bool:
        """Whether tiles get different parts of the gradient; see `shares`."""
        return bool(self.maxima)

    def part_of(self, whole: Tensor, rect: Rect | None) -> Tensor:
        """The part of a tensor like the result (reduced dimensions retained) to which a block at `rect` contributes."""
        return whole

    def values(self) -> tuple[Tensor, ...]:
        """The reduction's values as in stock PyTorch: new tensors that the caller may change."""
        assert self.total is not None
        if self.deviations is not None:
            return self.total.to(self.dtype, copy=True), (self.deviations / self.seen).to(self.dtype)
        value = self.total
        if self.reduction.count != 1:  # as in stock PyTorch, an overflowing sum stays infinite when it is divided
            value = value.to(torch.promote_types(self.dtype, torch.float32)) / self.reduction.count
        found = [value.to(self.dtype)]
        if len(self.reduction.outputs) > 1:  # a shard also counts the elements equal to its maximum
            first, has = self.reduction.first_only, self.reduction.has
            counts = [has(part, self.total) * (1 if first else note) for part, note in self.maxima.values()]
            found.append(torch.stack(counts).sum(0, dtype=torch.float64))
        return tuple((t if self.reduction.keepdim else t.squeeze(self.reduction.dims)).clone() for t in found)

    def shares(self) -> dict[tuple[int, int], Tensor]:
        """For a maximum, the factor of the gradient of each tile's own maximum."""
        assert self.total is not None
        tops = {tile: self.reduction.has(part, self.total) for tile, (part, _) in self.maxima.items()}
        notes = {tile: note for tile, (_, note) in self.maxima.items()}
        if self.reduction.first_only:
            # Pooling picks the first of equal elements, but the last NaN, so indices of NaN are negated.
            far, sign = torch.iinfo(torch.int64).max, 1 - 2 * self.total.isnan().long()
            places = {tile: torch.where(top, notes[tile] * sign, far) for tile, top in tops.items()}
            first = torch.stack(list(places.values())).amin(0)
            return {tile: place == first for tile, place in places.items()}
        counts = {tile: (top * notes[tile]).double() for tile, top in tops.items()}
        total = torch.stack(list(counts.values())).sum(0)
        return {tile: count / total for tile, count in counts.items()}


def moments_of(block: Tensor, dims: tuple[int, ...], precise: bool = False, look: bool = True) -> tuple[Tensor, Tensor]:
    """Mean of a block, and sum of squared deviations from it, with the reduced dimensions retained.

    They are computed in the block's dtype (at least float32) if that is accurate. Otherwise they are computed in
    float64, relative to an element of the block: if squares overflow, or deviations are as small as the rounding error.

    Args:
        dims: the dimensions to reduce.
        precise: whether to always use float64.
        look: whether the result may depend on a check of the values; they are checked on the CPU only.
    """
    if not precise:
        x = block.to(torch.promote_types(block.dtype, torch.float32))
        mean = x.mean(dims, keepdim=True)
        deviations = (x - mean).square_().sum(dims, keepdim=True, dtype=x.dtype)
        if not look or block.device.type != "cpu":
            return mean, deviations
        rounding = mean.square().mul_((8 * torch.finfo(x.dtype).eps) ** 2 * (x.numel() // mean.numel()))
        told = (deviations > rounding).logical_and_(deviations < torch.inf)
        if told.all() or told.logical_or_(deviations == 0).all():
            return mean, deviations
    x = block.to(torch.float32 if block.device.type == "mps" else torch.float64)
    centre = x
    for dim in dims:
        centre = centre.narrow(dim, 0, 1)
    centre = torch.where(centre.isfinite(), centre, 0)
    x = x - centre
    mean = x.mean(dims, keepdim=True)
    return centre + mean, x.sub_(mean).square_().sum(dims, keepdim=True)


class Largest(torch.autograd.Function):
    """A block's maximum, where NaN counts as the largest; all elements equal to it share its gradient equally."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, reduction: Reduction):
        top = block.amax(reduction.dims, keepdim=True)
        ctx.save_for_backward(block, top)
        ctx.reduction = reduction
        return top

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        block, top = ctx.saved_tensors
        has = ctx.reduction.has(block, top)
        return torch.where(has, grads[0] / has.sum(ctx.reduction.dims, keepdim=True), 0), None


@dataclass
class Consumer:
    """A reduction of a map, or (accumulator None) the stored map itself, with its gradients in pass 2."""

    accumulator: Accumulator | None
    grads: tuple[Tensor | None, ...]
    shares: dict[tuple[int, int], Tensor]

    @property
    def of_block(self) -> bool:
        """Whether the gradient refers to the block itself, not to a value reduced from it."""
        return self.accumulator is None or self.of_moments

    @property
    def of_moments(self) -> bool:
        return self.accumulator is not None and self.accumulator.reduction.kind == "moments"

    @property
    def is_sum(self) -> bool:
        """Whether this is a sum with equal gradients for all elements, so that pass 2 need not compute the sum."""
        reduction = None if self.accumulator is None else self.accumulator.reduction
        return reduction is not None and reduction.kind == "sum" and reduction.form is None and reduction.grid is None


Consumers = dict[int, list[Consumer]]
