"""Max-pooling without an index map.

    y[n, c, i, j] = max over r, s of  x[n, c, i*stride - top + r*dilation, j*stride - left + s*dilation]

Outside the window x is -inf. The gradient of y goes to the tap (r, s) that PyTorch chooses: the first maximum in
row-major order, or the last NaN if there is one. PyTorch saves an int64 index per output for that, four times the
output in bf16. These kernels save only x; the backward finds the taps again as bytes, R*S values and one for "none":

    taps    for each window: number r*S + s of the tap with its maximum
    dx      for each pixel: sum of dy over the windows that chose it, in row-major order, without atomics

If a ReLU or ReLU6 made x, its slope can be applied as well (`mask_act`): a window's gradient goes to a pixel that
equals its maximum, so a maximum with slope zero sets the window's tap to "none", and nothing else is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import MASKS, slope, slope_reference
from .choice import run_fastest
from .dtypes import accumulator
from .stream import as_map, map_offsets, vector, whole
from .tiles import pool_tile
from .triton_private import jit_kernel
from .windows import ConvGeometry, empty_map, map_like, nhwc

NO_TAP = tl.constexpr(255)


class PoolSizes(NamedTuple):
    """Rows and columns of x and of y, channels, and blocks of channels; passed one by one, like a `Share`."""

    H: int
    W: int
    OH: int
    OW: int
    C: int
    blocks: int


class Pool(NamedTuple):
    """Compile-time constants: the filter's taps; rows, columns and channels of a tile; channels of a vector."""

    R: int
    S: int
    BH: int
    BW: int
    BC: int
    VEC: int
    ACC: tl.dtype


@triton.jit
def _tile_pixels(tile, H, W, BH: tl.constexpr, BW: tl.constexpr):
    """Image, rows [BH*BW], columns [BH*BW] of a tile of images of H x W pixels, and which of them exist."""
    rows, columns = tl.cdiv(H, BH), tl.cdiv(W, BW)
    m = tl.arange(0, BH * BW)
    # Division in 32 bits, which is cheap, but multiplication in 64.
    n = (tile // columns // rows).to(tl.int64)
    i = (tile // columns % rows).to(tl.int64) * BH + m // BW
    j = (tile % columns).to(tl.int64) * BW + m % BW
    return n, i, j, (i < H) & (j < W)


@triton.jit
def _at(m, n, i, j, c, VEC: tl.constexpr):
    """Addresses [BH*BW, BC] of the channels c of pixels (i, j) of image n."""
    return m.ptr + map_offsets(m, n, i, j, VEC)[:, None] + c[None, :]


@jit_kernel([*PoolSizes._fields, "top", "left"])
def _max_pool2d_kernel(
    x,  # map [N, C, H, W]
    y,  # map [N, C, OH, OW] or None
    taps,  # map [N, C, OH, OW] of bytes, or None
    H,
    W,
    OH,
    OW,
    C,
    blocks,
    top,
    left,
    stride_h,
    stride_w,
    dil_h,
    dil_w,
    MASK: tl.constexpr,
    POOL: tl.constexpr,
):
    """Maxima and their taps of a tile of BH x BW windows and BC channels."""
    S: tl.constexpr = POOL.S
    BC: tl.constexpr = POOL.BC
    PIXELS: tl.constexpr = POOL.BH * POOL.BW
    pid = tl.program_id(0)
    n, i, j, inside = _tile_pixels(pid // blocks, OH, OW, POOL.BH, POOL.BW)
    c = (pid % blocks).to(tl.int64) * BC + tl.arange(0, BC)
    wanted = (c < whole(C, POOL.VEC))[None, :]
    keep = inside[:, None] & wanted

    # A window of -inf gives its gradient to its first tap inside the map.
    h0, w0 = i * stride_h - top, j * stride_w - left
    r0, s0 = tl.cdiv(tl.maximum(-h0, 0), dil_h), tl.cdiv(tl.maximum(-w0, 0), dil_w)
    some = (r0 < POOL.R) & (s0 < S) & (h0 + r0 * dil_h < H) & (w0 + s0 * dil_w < W)
    none = tl.zeros((PIXELS, BC), tl.int32)
    tap = tl.where(some, r0 * S + s0, NO_TAP).to(tl.int32)[:, None] + none
    best = tl.full((PIXELS, BC), float("-inf"), POOL.ACC)
    for r in range(POOL.R):
        h = h0 + r * dil_h
        for s in tl.static_range(S):
            w = w0 + s * dil_w
            hit = (inside & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & wanted
            value = tl.load(_at(x, n, h, w, c, POOL.VEC), mask=hit, other=float("-inf")).to(POOL.ACC)
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            tap = tl.where(better, r * S + s, tap)
    if y.ptr is not None:
        tl.store(_at(y, n, i, j, c, POOL.VEC), best.to(y.ptr.dtype.element_ty), mask=keep)
    if taps.ptr is not None:
        if MASK != "none":
            tap = tl.where(slope(best, MASK) != 0.0, tap, NO_TAP)
        tl.store(_at(taps, n, i, j, c, POOL.VEC), tap.to(tl.uint8), mask=keep)


@jit_kernel([*PoolSizes._fields, "top", "left"])
def _max_pool2d_grad_kernel(
    dy,  # map [N, C, OH, OW]
    taps,  # map [N, C, OH, OW] of bytes
    dx,  # map [N, C, H, W]
    H,
    W,
    OH,
    OW,
    C,
    blocks,
    top,
    left,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    POOL: tl.constexpr,
):
    """dx of a tile of BH*STRIDE_H x BW*STRIDE_W pixels and BC channels."""
    S: tl.constexpr = POOL.S
    BC: tl.constexpr = POOL.BC
    PIXELS: tl.constexpr = POOL.BH * POOL.BW
    pid = tl.program_id(0)
    # Pixel (a*STRIDE_H + p - top, b*STRIDE_W + q - left): the taps that may have chosen it depend only on p and q.
    steps_h, steps_w = tl.cdiv(H + top, STRIDE_H), tl.cdiv(W + left, STRIDE_W)
    n, a, b, _ = _tile_pixels(pid // blocks, steps_h, steps_w, POOL.BH, POOL.BW)
    c = (pid % blocks).to(tl.int64) * BC + tl.arange(0, BC)
    wanted = (c < whole(C, POOL.VEC))[None, :]
    for p in tl.static_range(STRIDE_H):
        for q in tl.static_range(STRIDE_W):
            total = tl.zeros((PIXELS, BC), POOL.ACC)
            # Last taps first: they belong to the first windows, and PyTorch adds in that order.
            for r in range(POOL.R - 1, -1, -1):
                if (p - r * DIL_H) % STRIDE_H == 0:
                    i = a + (p - r * DIL_H) // STRIDE_H
                    for s in tl.static_range(S - 1, -1, -1):
                        if (q - s * DIL_W) % STRIDE_W == 0:
                            j = b + (q - s * DIL_W) // STRIDE_W
                            hit = ((i >= 0) & (i < OH) & (j >= 0) & (j < OW))[:, None] & wanted
                            tap = tl.load(_at(taps, n, i, j, c, POOL.VEC), mask=hit, other=NO_TAP)
                            d = tl.load(_at(dy, n, i, j, c, POOL.VEC), mask=hit, other=0.0)
                            total += tl.where(tap.to(tl.int32) == r * S + s, d.to(POOL.ACC), 0.0)
            h, w = a * STRIDE_H + p - top, b * STRIDE_W + q - left
            keep = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & wanted
            tl.store(_at(dx, n, h, w, c, POOL.VEC), total.to(dx.ptr.dtype.element_ty), mask=keep)


def _shared(
    x: Tensor, y: Tensor, cover: Sequence[int], kernel: Sequence[int], maps: Sequence[Tensor | None]
) -> tuple[int, PoolSizes, Pool]:
    """Programs, sizes and tile for tiles that cover `cover` rows and columns of each image."""
    n, c, h, w = x.shape
    rows, cols, channels = pool_tile(*cover, c, x.element_size())
    blocks = triton.cdiv(c, channels)
    programs = n * triton.cdiv(cover[0], rows) * triton.cdiv(cover[1], cols) * blocks
    sizes = PoolSizes(h, w, y.shape[2], y.shape[3], c, blocks)
    return programs, sizes, Pool(*kernel, rows, cols, channels, vector(*maps), accumulator(x.dtype))


def launch_max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    geometry: ConvGeometry,
    *,
    y: Tensor | None = None,
    taps: Tensor | None = None,
    mask_act: str = "none",
) -> None:
    """Write y and taps, if given.

    Args:
        x: (N, C, H, W) window.
        kernel: (height, width).
        y, taps: windows of the output's size; taps are of dtype uint8.
        mask_act: activation whose slope the taps include, "none" or one of MASKS.
    """
    wanted = y if y is not None else taps
    if wanted is None or not wanted.numel():
        return
    programs, sizes, tile = _shared(x, wanted, wanted.shape[2:], kernel, (x, y, taps))
    window = geometry.top, geometry.left, *geometry.stride, *geometry.dilation
    _max_pool2d_kernel[(programs,)](as_map(x), as_map(y), as_map(taps), *sizes, *window, MASK=mask_act, POOL=tile)


def launch_max_pool2d_backward(
    dy: Tensor, taps: Tensor, dx: Tensor, kernel: Sequence[int], geometry: ConvGeometry
) -> None:
    """Write every pixel of dx, zero where no window chose it.

    Args:
        dy, taps: windows of the output's size.
        dx: (N, C, H, W) window.
    """
    if not dx.numel():
        return
    steps = (
        triton.cdiv(dx.shape[2] + geometry.top, geometry.stride_h),
        triton.cdiv(dx.shape[3] + geometry.left, geometry.stride_w),
    )
    programs, sizes, tile = _shared(dx, dy, steps, kernel, (dy, taps, dx))
    window = geometry.top, geometry.left, *geometry.stride, *geometry.dilation
    _max_pool2d_grad_kernel[(programs,)](as_map(dy), as_map(taps), as_map(dx), *sizes, *window, POOL=tile)


def max_pool2d_reference(x: Tensor, kernel: Sequence[int], geometry: ConvGeometry) -> Tensor:
    """y in plain PyTorch; autograd computes dx."""
    return F.max_pool2d(geometry.padded(x, float("-inf")), tuple(kernel), geometry.stride, 0, geometry.dilation)


def _output_shape(x: Tensor, kernel: Sequence[int], geometry: ConvGeometry) -> tuple[int, int, int, int]:
    if kernel[0] * kernel[1] > 255:
        raise ValueError(
            f"max_pool2d: a window of {kernel[0]} x {kernel[1]} has more than 255 taps; use a smaller window"
        )
    oh, ow = geometry.output(x, kernel)
    if oh < 1 or ow < 1:
        raise ValueError(
            f"max_pool2d: a window of {kernel[0]} x {kernel[1]}, dilation {geometry.dilation}, is larger than the map "
            f"of {x.shape[2]} x {x.shape[3]} with its padding; use a larger map"
        )
    return x.shape[0], x.shape[1], oh, ow


@torch.library.custom_op("gigamorph::max_pool2d", mutates_args=())
def max_pool2d(x: Tensor, kernel: Sequence[int], geometry: Sequence[int]) -> Tensor:
    """The maximum of each window.

    Args:
        kernel: (height, width).
        geometry: a `ConvGeometry`.
    """
    x, given = nhwc(x), ConvGeometry(*geometry)
    shape = _output_shape(x, kernel, given)

    def ours() -> Tensor:
        y = empty_map(*shape, x)
        launch_max_pool2d(x, kernel, given, y=y)
        return y

    def stock() -> Tensor:
        return nhwc(max_pool2d_reference(x, kernel, given))

    return run_fastest("max_pool2d", x, (*kernel, *given.form), ours, stock)


@max_pool2d.register_fake
def _(x: Tensor, kernel: Sequence[int], geometry: Sequence[int]) -> Tensor:
    return empty_map(*_output_shape(x, kernel, ConvGeometry(*geometry)), x)


@torch.library.custom_op("gigamorph::max_pool2d_backward", mutates_args=())
def max_pool2d_backward(
    dy: Tensor, x: Tensor, kernel: Sequence[int], geometry: Sequence[int], mask_act: str = "none"
) -> Tensor:
    """The gradient of x, times the slope of the activation that made x (`mask_act`, one of MASKS)."""
    if mask_act not in MASKS and mask_act != "none":
        raise ValueError(
            f"max_pool2d_backward: the slope of {mask_act!r} does not follow from x; apply it with act_grad"
        )
    x, given = nhwc(x), ConvGeometry(*geometry)
    n, c, oh, ow = _output_shape(x, kernel, given)
    if dy.shape != (n, c, oh, ow):
        raise ValueError(
            f"max_pool2d_backward: dy {tuple(dy.shape)} must have the shape of the output, {(n, c, oh, ow)}"
        )
    dy = nhwc(dy)

    def ours() -> Tensor:
        taps = torch.empty(n, oh, ow, c, dtype=torch.uint8, device=x.device).permute(0, 3, 1, 2)
        dx = map_like(x)
        launch_max_pool2d(x, kernel, given, taps=taps, mask_act=mask_act)
        launch_max_pool2d_backward(dy, taps, dx, kernel, given)
        return dx

    def stock() -> Tensor:
        padded = given.padded(x, float("-inf"))
        window = list(kernel), list(given.stride), [0, 0], list(given.dilation), False
        _, indices = torch.ops.aten.max_pool2d_with_indices(padded, *window)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dy, padded, *window, indices)
        dx = dx[:, :, given.top : given.top + x.shape[2], given.left : given.left + x.shape[3]]
        dx = dx.clone() if mask_act == "none" else dx * slope_reference(x, mask_act)
        return nhwc(dx)

    return run_fastest("max_pool2d_backward", x, (*kernel, *given.form, mask_act), ours, stock)


@max_pool2d_backward.register_fake
def _(dy: Tensor, x: Tensor, kernel: Sequence[int], geometry: Sequence[int], mask_act: str = "none") -> Tensor:
    return map_like(x)
