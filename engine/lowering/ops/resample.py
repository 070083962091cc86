"""Resampling: each output is a weighted sum of neighbouring inputs along each axis.

Nearest copies one; bilinear blends two; bicubic four; area and antialiased modes as many as an output is wide. PyTorch
itself determines inputs and weights, one axis at a time, in float64 unless it rounds to the nearest input.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...capture.program import Op
from ..geometry import Gather
from .base import Block, Env, Local, Maps, Refusal, arguments
from .constants import Constants

INTERPOLATE = "input size scale_factor mode align_corners recompute_scale_factor antialias"


def _interpolated(op: Op, rows: Tensor, size_out: int, axis: int, high: int = 1) -> Tensor:
    """Rows (channels, size_in) resampled as the op does along one of its axes, in an image of `high` equal rows.

    They run along the width: PyTorch 2.13 is wrong along the height if the width is one and antialias is on.
    """
    given = arguments(op, INTERPOLATE, mode="nearest", antialias=False)
    scale = given["scale_factor"]
    kwargs: dict[str, object] = {name: given[name] for name in ("mode", "align_corners", "antialias")}
    if given["size"] is not None:
        kwargs["size"] = (high, size_out)
    else:
        factors = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
        kwargs |= {"scale_factor": (1.0, factors[axis]), "recompute_scale_factor": given["recompute_scale_factor"]}
    image = rows[None, :, None].expand(-1, -1, high, -1)
    return F.interpolate(image, **kwargs)[0, :, 0]  # pyright: ignore[reportArgumentType]


def positions(op: Op, size_in: int, size_out: int, axis: int) -> Tensor:
    """The position of every output of an interpolation among the inputs of an axis, computed by PyTorch in float64."""
    return _interpolated(op, torch.arange(size_in, dtype=torch.float64)[None], size_out, axis)[0]


def nearest(op: Op, maps: Maps, value: int, axis: int) -> Gather:
    """The input of an axis that every output of a nearest interpolation copies.

    PyTorch rounds an output halfway between two inputs to one of them. It computes in float32, except for float64 maps
    on the CPU whose output has more than 128 rows and columns, unless more than 3 channels are last in memory.
    """
    size_in, out, info = maps.size(value)[axis], maps.shape(op.outputs[0])[2:], maps.program.values[value]
    last = info.order == (0, 2, 3, 1) and info.shape[1] > 3
    if info.dtype == torch.float64 and info.device.type == "cpu" and sum(out) > _BOTH and not last:
        dtype, high = torch.float64, max(_BOTH + 1 - out[axis], 1)
    else:
        dtype, high = torch.float32, 1
    sources = _interpolated(op, torch.arange(size_in, dtype=dtype)[None], out[axis], axis, high)[0]
    return Gather(size_in, out[axis], tuple(sources.long().tolist()))


def _behind(op: Op, size_in: int, size_out: int, axis: int) -> Tensor:
    """Mask of the outputs of an interpolation beyond the centre of the last input of an axis."""
    given = arguments(op, INTERPOLATE)
    if given["align_corners"]:
        return torch.zeros(size_out, dtype=torch.bool)
    scale, factor = size_in / size_out, given["scale_factor"]
    if factor is not None and not given["recompute_scale_factor"]:
        scale = 1 / (factor[axis] if isinstance(factor, (tuple, list)) else factor)
    return (torch.arange(size_out, dtype=torch.float64) + 0.5) * scale - 0.5 > size_in - 1


def select(x: Tensor, dim: int, indices: Tensor) -> Tensor:
    """`x.index_select(dim, indices)` in the memory order of x, so that the next convolution need not change it."""
    if x.dim() == 4 and dim >= 2 and x.stride(1) == 1:
        return x.permute(0, 2, 3, 1).index_select(dim - 1, indices).permute(0, 3, 1, 2)
    return x.index_select(dim, indices)


class _Blend:
    """Bilinear resampling of one axis: two inputs for every output, and the weight of the second."""

    def __init__(self, op: Op, size_in: int, size_out: int, axis: int):
        indices = positions(op, size_in, size_out, axis).clamp(0, size_in - 1)
        lower = indices.floor().cummax(0).values
        weights = (indices - lower).clamp(min=0)
        # Beyond the last input PyTorch blends it with itself; a weight of zero would turn infinity into NaN.
        self.weights: list[float] = torch.where(_behind(op, size_in, size_out, axis), 0.5, weights).tolist()
        first = tuple(int(i) for i in lower.tolist())
        self.access = Gather(size_in, size_out, first, tuple(min(i + 1, size_in - 1) for i in first))
        self._constants = Constants()

    def __call__(self, x: Tensor, dim: int, span: tuple[int, int]) -> Tensor:
        start, these = self.access.span(*span)[0], slice(*span)
        assert self.access.last is not None
        lower, upper = (
            self._constants.numbers([i - start for i in row[these]], x)
            for row in (self.access.sources, self.access.last)
        )
        weight = self._constants.numbers(self.weights[these], x, x.dtype)
        weight = weight.reshape([-1 if d == dim else 1 for d in range(x.dim())])
        # In place: these maps are the largest here, and autograd saves none of them.
        return select(x, dim, lower).mul_(1 - weight).add_(select(x, dim, upper).mul_(weight))


class _Weights:
    """Resampling of one axis: the inputs of every output, and their weights.

    Impulses measure the weights: input i goes to channel i % apart, so that no output reads two inputs of one channel.
    The output's position identifies the input of a channel.
    """

    def __init__(self, op: Op, size_in: int, size_out: int, axis: int, reach: float):
        """`reach` bounds the distance of an output's inputs from its position."""
        apart = min(2 * math.ceil(reach) + 2, size_in)
        centre = positions(op, size_in, size_out, axis).round().long().clamp(0, size_in - 1)
        inputs, weights = [], []
        for channels in torch.arange(apart).split(_CHANNELS):
            impulses = (torch.arange(size_in) % apart == channels[:, None]).double()
            weights.append(_interpolated(op, impulses, size_out, axis))
            nearest = centre - apart // 2 + (channels[:, None] - centre + apart // 2) % apart
            inputs.append(nearest if apart < size_in else channels[:, None].expand(-1, size_out))
        found, weight = torch.cat(inputs).T, torch.cat(weights).T
        nonzero = weight != 0
        first = torch.where(nonzero, found, size_in).amin(1)
        last = torch.where(nonzero, found, -1).amax(1)
        # Neighbours may leave out inputs whose weight happens to be zero; accesses never go back.
        first = first.flip(0).cummin(0).values.flip(0)
        last = last.cummax(0).values
        self.count = int((last - first).max()) + 1
        column = torch.where(nonzero, found - first[:, None], self.count)
        self.weights = torch.zeros(size_out, self.count + 1, dtype=torch.float64).scatter_add_(1, column, weight)
        self.access = Gather(size_in, size_out, tuple(first.tolist()), tuple(last.tolist()))
        self._constants = Constants()

    def __call__(self, x: Tensor, dim: int, span: tuple[int, int]) -> Tensor:
        if self.count <= _FEW:
            total = x.new_zeros(())
            every = self._constants.cached(span, x, partial(self._indices, span))
            weights = self._constants.cached((span, x.dtype), x, partial(self._shares, span, x.dtype))
            for indices, weight in zip(every, weights, strict=True):
                weight = weight.reshape([-1 if d == dim else 1 for d in range(x.dim())])
                total = total + x.index_select(dim, indices).mul_(weight)
            return total
        matrix = self._constants.cached((span, x.dtype), x, partial(self._matrix, span, x.dtype))
        return matrix @ x if dim == x.dim() - 2 else x @ matrix.T

    def _first(self, span: tuple[int, int]) -> Tensor:
        """The first input of each output, as seen from the window's start."""
        return torch.tensor(self.access.sources[slice(*span)]) - self.access.span(*span)[0]

    def _indices(self, span: tuple[int, int]) -> Tensor:
        """(count, outputs): the inputs of each output, one after the other."""
        start, end = self.access.span(*span)
        return (self._first(span) + torch.arange(self.count)[:, None]).clamp_max(end - start - 1)

    def _shares(self, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """(count, outputs): their weights."""
        return self.weights[slice(*span), : self.count].T.to(dtype).contiguous()

    def _matrix(self, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
        start, end = self.access.span(*span)
        matrix = torch.zeros(span[1] - span[0], end - start + self.count, dtype=torch.float64)
        weights = self.weights[slice(*span), : self.count]
        matrix.scatter_(1, self._first(span)[:, None] + torch.arange(self.count), weights)
        return matrix[:, : end - start].to(dtype)


_BOTH = 128  # rows plus columns up to which PyTorch computes nearest inputs one by one
_FEW = 8  # inputs per output that are added one after the other; more are a matrix product
_CHANNELS = 64  # impulses that are resampled at once


def weighted(op: Op, maps: Maps, value: int) -> Local:
    """`F.interpolate` of a map (N, C, H, W) with mode "bicubic" or "area", or antialiased."""
    given = arguments(op, INTERPOLATE, mode="nearest")
    size, out = maps.size(value), maps.shape(op.outputs[0])[2:]
    if given["antialias"] and 1 in (size[1], out[1]):
        raise Refusal(
            f"'{op.name}' with antialias from or to one column is not supported: PyTorch 2.13 itself is wrong there"
        )
    axes = []
    for axis in (0, 1):
        scale = given["scale_factor"]
        factor = scale[axis] if isinstance(scale, (tuple, list)) else scale
        ratio = max(size[axis] / out[axis], 1 / factor if factor else 0, 1.0)
        wide = 1.0 if given["mode"] == "bicubic" and not given["antialias"] else ratio
        axes.append(_Weights(op, size[axis], out[axis], axis, 4 * wide + 2))
    return _resampled(op, maps, value, axes[0], axes[1])


def bilinear(op: Op, maps: Maps, value: int) -> Local:
    """`F.interpolate(mode="bilinear")` of a map (N, C, H, W)."""
    return blended(op, op, maps, value)


def blended(op: Op, plane: Op, maps: Maps, value: int, before: Callable[[Tensor], Tensor] | None = None) -> Local:
    """A map or volume resampled linearly along height and width as `plane` says, after `before`."""
    size, out = maps.size(value), maps.shape(op.outputs[0])[-2:]
    rows, cols = (_Blend(plane, size[axis], out[axis], axis) for axis in (0, 1))
    return _resampled(op, maps, value, rows, cols, before)


def _resampled(
    op: Op,
    maps: Maps,
    value: int,
    rows: _Blend | _Weights,
    cols: _Blend | _Weights,
    before: Callable[[Tensor], Tensor] | None = None,
) -> Local:
    """A local op that resamples along both axes, 16-bit maps in float32."""
    h, w = maps.axes[value]

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x = env[value] if before is None else before(env[value])
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        # Autocast would compute the products of weights in 16 bits.
        with torch.autocast(x.device.type, enabled=False) if isinstance(rows, _Weights) else contextlib.nullcontext():
            return (rows(cols(wide, w, block.cols), h, block.rows).to(x.dtype),)

    return Local(op, {value: (rows.access, cols.access)}, ((h, w),), run)
