"""The fused convolution by PyTorch's own ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import activate_reference
from .windows import ConvGeometry, nhwc


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else (weight * scale.reshape(-1, 1, 1, 1)).to(weight.dtype)


def split_padding(geometry: ConvGeometry) -> tuple[list[int], list[int]]:
    """Splits the padding into the even part that PyTorch's convolutions add and the rest in the order of `F.pad`."""
    top, bottom, left, right = geometry.padding
    rows, cols = min(top, bottom), min(left, right)
    return [rows, cols], [left - cols, right - cols, top - rows, bottom - rows]


def forward_stock(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    act: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    """y and z by PyTorch's own ops, in place where possible."""
    even, uneven = split_padding(geometry)
    if any(uneven):
        x = F.pad(x, uneven)
    bias = shift.to(x.dtype) if scale is None and shift is not None else None
    z = F.conv2d(x, weight, bias, geometry.stride, even, geometry.dilation, geometry.groups)  # pyright: ignore
    if scale is not None:
        z.mul_(scale.reshape(-1, 1, 1))
        if shift is not None:
            z.add_(shift.reshape(-1, 1, 1))
    if residual is not None:
        z.add_(residual)
    z = nhwc(z)
    if keep_z:
        return activate_reference(z, act), z
    y = {"relu": F.relu_, "none": lambda t: t}.get(act, lambda t: activate_reference(t, act))(z)
    return y, x.new_empty(0)


def backward_stock(dz: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry, wanted: list[bool]) -> Any:
    """PyTorch's gradients of a convolution of x, which already includes the uneven part of the padding."""
    even, _ = split_padding(geometry)
    settings = list(geometry.stride), even, list(geometry.dilation), False, [0, 0], geometry.groups
    return torch.ops.aten.convolution_backward(dz, x, weight, None, *settings, wanted)
