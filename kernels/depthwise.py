"""Fused depthwise convolution, one filter per channel, with one pass over memory per op:

    y   = act(z),   z = conv(x, w) + shift + residual
    dx  = (conv_transpose(dz, w) + addend) * slope(mask),   dz = dy * slope(gate)
    dw[c, r, s] += sum of dz * x over the pixels that tap (r, s) joins,   dshift[c] += sum of dz over all pixels

    conv(x, w)[n, c, i, j] = sum over r, s of  x[n, c, h, w] * w[c, r, s]
                             at h = i*stride - top + r*dilation, w = j*stride - left + s*dilation

There is no sum over channels, so tensor cores do not help, and memory determines the time if a value is not loaded and
converted again for each tap. A program computes TH rows of output, with a vector of channels in each thread: for one
filter column it loads every row of input once and adds it to all rows of output that use it. Filter columns read the
same values again from the first-level cache.

The data gradient is the same kernel: a correlation of dz with flipped filters, on a grid where values of dz have the
distance `stride` ("up"), just as the forward's outputs have the distance `stride` on its input ("down").
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .depthwise_kernels import DepthwiseBlock, Filter, Sizes, depthwise_kernel, depthwise_wgrad_kernel
from .dtypes import accumulator
from .stream import as_map, dense, vector
from .tiles import FILTER_ROWS, TAPS, depthwise_tile, depthwise_wgrad_splits, equal_part
from .windows import ConvGeometry


def _check_filter(name: str, weight: Tensor, channels: int) -> None:
    if weight.shape[:2] != (channels, 1):
        raise ValueError(
            f"{name}: weights {tuple(weight.shape)} for {channels} channels must have the shape ({channels}, 1, R, S)"
        )


class GridSteps(NamedTuple):
    """Steps between outputs on the input grid, and between values of the input; one of both is 1.

    Attributes:
        down: steps from one output to the next.
        up: distance of values of the input.
        top, left: zeros before the input, in steps of the grid.
        flipped: whether the filters are flipped.
    """

    down: tuple[int, int]
    up: tuple[int, int]
    top: int
    left: int
    flipped: bool


def _launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    steps: GridSteps,
    dilation: tuple[int, int],
    *,
    act: str = "none",
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    gate: Tensor | None = None,
    gate_act: str = "none",
    mask: Tensor | None = None,
    mask_act: str = "none",
) -> None:
    n, channels, h, w = x.shape
    _, _, oh, ow = y.shape
    _, _, r, s = weight.shape
    if not y.numel():
        return
    # The first tile begins where its first tap coincides with a value of the input on the grid.
    (up_h, up_w), lead_h, lead_w = steps.up, -steps.top % steps.up[0], -steps.left % steps.up[1]
    tile = depthwise_tile(x.dtype, channels, oh + lead_h, triton.cdiv(ow + lead_w, up_w))
    rows = triton.cdiv(tile.rows, up_h) * up_h
    held = r if r <= FILTER_ROWS else triton.cdiv(equal_part(r, FILTER_ROWS), up_h) * up_h
    lines, segments = triton.cdiv(oh + lead_h, rows), triton.cdiv(ow + lead_w, tile.pixels * up_w)
    programs = triton.cdiv(channels, tile.channels) * up_w * segments * lines * n
    if programs >= 2**31:
        raise ValueError(
            f"depthwise: an output of {n} x {oh} x {ow} pixels is too large for one launch; use smaller tiles"
        )
    maps = x, gate, residual, mask, y, z
    depthwise_kernel[(programs,)](
        *map(as_map, maps),
        weight.reshape(channels, r * s).t().contiguous(),
        dense(shift),
        *Sizes(h, w, oh, ow, channels, lines, segments),
        lead_h,
        lead_w,
        (lead_h + steps.top) // up_h,
        (lead_w + steps.left) // up_w,
        UP_H=up_h,
        UP_W=up_w,
        S_STEP=up_w // math.gcd(up_w, dilation[1]),
        FLIPPED=steps.flipped,
        ACT=act,
        GATE=gate_act,
        MASK=mask_act,
        F=Filter(r, s, *steps.down, *dilation),
        B=DepthwiseBlock(held, 1, rows, tile.pixels, tile.channels, vector(*maps), accumulator(x.dtype)),
        num_warps=tile.num_warps,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: ConvGeometry,
    act: str = "none",
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    z: Tensor | None = None,
) -> None:
    """Write y, and z if given (the input of the activation).

    Args:
        x: (N, C, H, W) window.
        weight: (C, 1, R, S).
        y: (N, C, OH, OW) window to be written.
        shift: (C,).
        residual, z: windows of y's size.
    """
    _check_filter("depthwise_forward", weight, x.shape[1])
    steps = GridSteps(geometry.stride, (1, 1), geometry.top, geometry.left, False)
    _launch(x, weight, y, steps, geometry.dilation, act=act, shift=shift, residual=residual, z=z)


def dgrad(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    geometry: ConvGeometry,
    *,
    gate: Tensor | None = None,
    gate_act: str = "none",
    addend: Tensor | None = None,
    mask: Tensor | None = None,
    mask_act: str = "none",
) -> None:
    """Write dx.

    Args:
        dy: (N, C, OH, OW) window, the gradient of y.
        weight: (C, 1, R, S).
        dx: (N, C, H, W) window to be written.
        geometry: the geometry of the forward.
        gate: window of dy's size, y or z of the op itself, which determines the slope of `gate_act`.
        addend: window of dx's size, the gradient of another branch.
        mask: window of dx's size, y or z of the activation `mask_act` that made x.
    """
    _check_filter("depthwise_dgrad", weight, dy.shape[1])
    top = geometry.dilation_h * (weight.shape[2] - 1) - geometry.top
    left = geometry.dilation_w * (weight.shape[3] - 1) - geometry.left
    slopes = {"gate": gate, "gate_act": gate_act, "mask": mask, "mask_act": mask_act}
    steps = GridSteps((1, 1), geometry.stride, top, left, True)
    _launch(dy, weight, dx, steps, geometry.dilation, residual=addend, **slopes)


def wgrad(
    x: Tensor,
    dy: Tensor,
    dw: Tensor,
    dshift: Tensor,
    geometry: ConvGeometry,
    *,
    gate: Tensor | None = None,
    gate_act: str = "none",
) -> None:
    """Add to dw and dshift. Two runs agree bit by bit: each split sums its tiles in order, then the splits are summed.

    Args:
        x: (N, C, H, W) window.
        dy: (N, C, OH, OW) window, the gradient of y.
        dw: (C, 1, R, S), float32 (float64 for float64 maps).
        dshift: (C,), of the same dtype.
        gate: window of dy's size, y or z of the op itself, which determines the slope of `gate_act`.
    """
    _check_filter("depthwise_wgrad", dw, x.shape[1])
    n, channels, h, w = x.shape
    _, _, oh, ow = dy.shape
    _, _, r, s = dw.shape
    if not dy.numel():
        return
    rows = equal_part(r, FILTER_ROWS)
    columns = equal_part(s, TAPS // rows)
    tile = depthwise_tile(x.dtype, channels, oh, ow, rows * columns)
    lines, segments = triton.cdiv(oh, tile.rows), triton.cdiv(ow, tile.pixels)
    tiles = n * lines * segments
    programs = triton.cdiv(channels, tile.channels) * triton.cdiv(r, rows) * triton.cdiv(s, columns)
    share = triton.cdiv(tiles, depthwise_wgrad_splits(programs, tiles))
    splits = triton.cdiv(tiles, share)
    part = torch.empty(splits, r * s + 1, channels, dtype=dw.dtype, device=x.device)
    acc = accumulator(x.dtype)
    depthwise_wgrad_kernel[(programs, splits)](
        *map(as_map, (x, dy, gate)),
        part,
        *Sizes(h, w, oh, ow, channels, lines, segments),
        tiles,
        share,
        geometry.top,
        geometry.left,
        GATE=gate_act,
        F=Filter(r, s, *geometry.stride, *geometry.dilation),
        B=DepthwiseBlock(rows, columns, tile.rows, tile.pixels, tile.channels, vector(x, dy, gate), acc),
        num_warps=tile.num_warps,
    )
    total = part.sum(0)
    dw.view(channels, r * s).add_(total[:-1].t())
    dshift.add_(total[-1])
