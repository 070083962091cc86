"""The arguments of a stem and its reference in plain PyTorch; `stem.py` has the formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import activate_reference, slope_reference
from .dtypes import sum_dtype
from .windows import ConvGeometry, empty_map, nhwc, output_size

ACTIVATIONS = ("none", "relu", "relu6")  # monotonic ones
NO_SPOT = 255  # of a pixel of y where the activation's slope is zero
_WINDOW = [3, 3], [2, 2], [0, 0], [1, 1], False  # arguments of PyTorch's pooling ops


@dataclass(frozen=True, eq=False)
class Stem:
    """A stem and the pixels that it is applied to.

    Attributes:
        x: (N, C, H, W) pixels with any strides: uint8, uint16 (also as the bits of int16) or floating point.
        weight: (K, C, R, S), in the dtype to compute in.
        scale, shift: (K,), or None.
        gain, offset: (C,) floating point, or both None.
        low, high: bounds to which normalised pixels are clamped.
        geometry: the geometry of the convolution, which is padded with zeros after normalisation.
        pool_padding: (top, bottom, left, right) of the pooling, each 0 or 1; None for no pooling.

    Raises:
        ValueError: for arguments that the kernels do not support.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    low: float
    high: float
    geometry: ConvGeometry
    pool_padding: Sequence[int] | None
    act: str

    def __post_init__(self) -> None:
        channels, wanted, pool = self.x.shape[1], self.weight.shape[1], self.pool_padding
        if self.act not in ACTIVATIONS:
            raise ValueError(
                f"stem: activation {self.act!r} is not monotonic, so it cannot follow a pooling; use {ACTIVATIONS}"
            )
        if (self.gain is None) != (self.offset is None):
            raise ValueError("stem: gain and offset must be given together, or neither")
        if channels != wanted:
            raise ValueError(f"stem: pixels have {channels} channels, but the filters need {wanted}")
        if min(self.geometry.padding) < 0 or (pool is not None and not 0 <= min(pool) <= max(pool) <= 1):
            raise ValueError(
                f"stem: padding {self.geometry.padding} must not be negative, and pool_padding {pool} must be 0 or 1"
            )

    @property
    def pixels(self) -> Tensor:
        """x; int16 is PyTorch's older name for the bits of uint16."""
        return self.x.view(torch.uint16) if self.x.dtype == torch.int16 else self.x

    @property
    def clamps(self) -> bool:
        return self.low > -math.inf or self.high < math.inf

    @property
    def normalises(self) -> bool:
        return self.clamps or self.gain is not None

    @property
    def conv_size(self) -> tuple[int, int]:
        """Rows and columns of conv outputs."""
        return self.geometry.output(self.x, self.weight.shape[2:])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        oh, ow = self.conv_size
        if self.pool_padding is not None:
            top, bottom, left, right = self.pool_padding
            oh, ow = output_size(oh, 3, 2, 1, top, bottom), output_size(ow, 3, 2, 1, left, right)
        return self.x.shape[0], self.weight.shape[0], oh, ow

    @property
    def matrix(self) -> Tensor:
        """The filters as [taps x channels, K]."""
        return self.weight.permute(2, 3, 1, 0).reshape(-1, self.weight.shape[0])

    @property
    def settings(self) -> tuple:
        """The key of a measurement: everything but the pixels that the time depends on."""
        named = ("scale", self.scale), ("shift", self.shift), ("gain", self.gain), ("offset", self.offset)
        given = [name for name, t in named if t is not None]
        kind = *self.weight.shape, str(self.weight.dtype), *given
        return (*kind, *self.geometry.form, self.pool_padding is not None, self.act)

    def check_map(self, name: str, y: Tensor) -> None:
        if y.shape != self.shape or (y.stride(1) != 1 and y.shape[1] > 1):
            raise ValueError(
                f"stem: {name} is {tuple(y.shape)}, {y.stride()}; it must be a channels-last map of {self.shape}"
            )


def _normalised(stem: Stem) -> Tensor:
    """The padded window of values that the convolution reads."""
    v = stem.pixels.to(torch.promote_types(stem.weight.dtype, torch.float32))
    if stem.gain is not None and stem.offset is not None:
        v = v * stem.gain.reshape(-1, 1, 1) + stem.offset.reshape(-1, 1, 1)
    if stem.clamps:
        v = v.clamp(stem.low, stem.high)
    return stem.geometry.padded(v.to(stem.weight.dtype))


def _activated(stem: Stem, v: Tensor) -> Tensor:
    """act(conv(v, w) * scale + shift) of normalised values."""
    z = F.conv2d(v, stem.weight, None, stem.geometry.stride)
    if stem.scale is not None:
        z = z * stem.scale.reshape(-1, 1, 1)
    if stem.shift is not None:
        z = z + stem.shift.reshape(-1, 1, 1)
    return activate_reference(z, stem.act)


def _pool_padded(stem: Stem, y: Tensor) -> Tensor:
    top, bottom, left, right = stem.pool_padding or (0, 0, 0, 0)
    return F.pad(y, [left, right, top, bottom], value=-math.inf)


def stem_reference(stem: Stem) -> Tensor:
    """y in plain PyTorch: normalised in at least float32, the rest in the dtype of weight."""
    y = _activated(stem, _normalised(stem))
    return y if stem.pool_padding is None else F.max_pool2d(_pool_padded(stem, y), 3, 2)


def stem_spots_reference(stem: Stem) -> tuple[Tensor, Tensor]:
    """y and its spots with PyTorch's own ops."""
    y = _activated(stem, _normalised(stem))
    if stem.pool_padding is None:
        spots = torch.zeros_like(y, dtype=torch.uint8)
    else:
        padded = _pool_padded(stem, y)
        y, indices = torch.ops.aten.max_pool2d_with_indices(padded, *_WINDOW)
        width = padded.shape[3]
        rows, columns = _corners(y)
        spots = ((indices // width - rows) * 3 + indices % width - columns).to(torch.uint8)
    return y, nhwc(spots.masked_fill(slope_reference(y, stem.act) == 0, NO_SPOT))


def _corners(y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (PH, 1) and columns (PW,) of the padded map where windows begin."""
    rows, columns = (2 * torch.arange(size, device=y.device) for size in y.shape[2:])
    return rows[:, None], columns


def stem_gradients_reference(stem: Stem, dy: Tensor, spots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, scale and shift with PyTorch's own ops."""
    wide, aten = sum_dtype(stem.weight.dtype), torch.ops.aten
    v, dz = _normalised(stem), dy.masked_fill(spots == NO_SPOT, 0)
    if stem.pool_padding is not None:
        top, bottom, left, right = stem.pool_padding
        height, width = stem.conv_size
        padded = empty_map(*dy.shape[:2], height + top + bottom, width + left + right, dy)  # only its shape is read
        (rows, columns), spot = _corners(dy), spots.clamp(max=8).long()
        indices = (rows + spot // 3) * padded.shape[3] + columns + spot % 3
        dz = aten.max_pool2d_with_indices_backward(dz, padded, *_WINDOW, indices)
        dz = dz[:, :, top : top + height, left : left + width]
    dshift = dz.sum((0, 2, 3), dtype=wide)
    stride, mask = list(stem.geometry.stride), [False, True, False]
    dweight = aten.convolution_backward(dz, v, stem.weight, None, stride, [0, 0], [1, 1], False, [0, 0], 1, mask)[1]
    dweight = dweight.to(wide)
    dscale = (dweight * stem.weight).sum((1, 2, 3))
    if stem.scale is not None:
        dweight = dweight * stem.scale.to(wide).reshape(-1, 1, 1, 1)
    return dweight, dscale, dshift
