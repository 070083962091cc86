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
        x: (N, C, H, W) floating-point pixels with any strides.
        weight: (K, C, R, S), in the dtype to compute in.
        shift: (K,), or None.
        geometry: the geometry of the convolution, which is padded with zeros.
        pool_padding: (top, bottom, left, right) of the pooling, each 0 or 1.

    Raises:
        ValueError: for arguments that the kernels do not support.
    """

    x: Tensor
    weight: Tensor
    shift: Tensor | None
    geometry: ConvGeometry
    pool_padding: Sequence[int]
    act: str

    def __post_init__(self) -> None:
        channels, wanted, pool = self.x.shape[1], self.weight.shape[1], self.pool_padding
        if self.act not in ACTIVATIONS:
            raise ValueError(
                f"stem: activation {self.act!r} is not monotonic, so it cannot follow a pooling; use {ACTIVATIONS}"
            )
        if channels != wanted:
            raise ValueError(f"stem: pixels have {channels} channels, but the filters need {wanted}")
        if min(self.geometry.padding) < 0 or not 0 <= min(pool) <= max(pool) <= 1:
            raise ValueError(
                f"stem: padding {self.geometry.padding} must not be negative, and pool_padding {pool} must be 0 or 1"
            )

    @property
    def conv_size(self) -> tuple[int, int]:
        """Rows and columns of conv outputs."""
        return self.geometry.output(self.x, self.weight.shape[2:])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        (oh, ow), (top, bottom, left, right) = self.conv_size, self.pool_padding
        rows, columns = output_size(oh, 3, 2, 1, top, bottom), output_size(ow, 3, 2, 1, left, right)
        return self.x.shape[0], self.weight.shape[0], rows, columns

    @property
    def matrix(self) -> Tensor:
        """The filters as [taps x channels, K]."""
        return self.weight.permute(2, 3, 1, 0).reshape(-1, self.weight.shape[0])

    @property
    def settings(self) -> tuple:
        """The key of a measurement: everything but the pixels that the time depends on."""
        return *self.weight.shape, str(self.weight.dtype), self.shift is None, *self.geometry.form, self.act

    def check_map(self, name: str, y: Tensor) -> None:
        if y.shape != self.shape or (y.stride(1) != 1 and y.shape[1] > 1):
            raise ValueError(
                f"stem: {name} is {tuple(y.shape)}, {y.stride()}; it must be a channels-last map of {self.shape}"
            )


def _pixels(stem: Stem) -> Tensor:
    """The padded window of pixels that the convolution reads."""
    return stem.geometry.padded(stem.x.to(stem.weight.dtype))


def _activated(stem: Stem) -> Tensor:
    """act(conv(x, w) + shift), padded for the pooling."""
    z = F.conv2d(_pixels(stem), stem.weight, None, stem.geometry.stride)
    if stem.shift is not None:
        z = z + stem.shift.reshape(-1, 1, 1)
    top, bottom, left, right = stem.pool_padding
    return F.pad(activate_reference(z, stem.act), [left, right, top, bottom], value=-math.inf)


def stem_reference(stem: Stem) -> Tensor:
    """y in plain PyTorch, in the dtype of weight."""
    return F.max_pool2d(_activated(stem), 3, 2)


def stem_spots_reference(stem: Stem) -> tuple[Tensor, Tensor]:
    """y and its spots with PyTorch's own ops."""
    padded = _activated(stem)
    y, indices = torch.ops.aten.max_pool2d_with_indices(padded, *_WINDOW)
    width = padded.shape[3]
    rows, columns = _corners(y)
    spots = ((indices // width - rows) * 3 + indices % width - columns).to(torch.uint8)
    return y, nhwc(spots.masked_fill(slope_reference(y, stem.act) == 0, NO_SPOT))


def _corners(y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (PH, 1) and columns (PW,) of the padded map where windows begin."""
    rows, columns = (2 * torch.arange(size, device=y.device) for size in y.shape[2:])
    return rows[:, None], columns


def stem_gradients_reference(stem: Stem, dy: Tensor, spots: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and shift with PyTorch's own ops."""
    wide, aten = sum_dtype(stem.weight.dtype), torch.ops.aten
    (top, bottom, left, right), (height, width) = stem.pool_padding, stem.conv_size
    padded = empty_map(*dy.shape[:2], height + top + bottom, width + left + right, dy)  # only its shape is read
    (rows, columns), spot = _corners(dy), spots.clamp(max=8).long()
    indices = (rows + spot // 3) * padded.shape[3] + columns + spot % 3
    dz = dy.masked_fill(spots == NO_SPOT, 0)
    dz = aten.max_pool2d_with_indices_backward(dz, padded, *_WINDOW, indices)
    dz = dz[:, :, top : top + height, left : left + width]
    settings = list(stem.geometry.stride), [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    dweight = aten.convolution_backward(dz, _pixels(stem), stem.weight, None, *settings)[1]
    return dweight.to(wide), dz.sum((0, 2, 3), dtype=wide)
