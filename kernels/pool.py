"""Max-pooling without an index map, and sums over pixels.

    y[n, c, i, j] = max over r, s of  x[n, c, i*stride - top + r*dilation, j*stride - left + s*dilation]

Outside the window x is -inf. The gradient of y belongs to the tap (r, s) that PyTorch chooses: the first maximum in
row-major order, and the last NaN where there is one. PyTorch keeps an int64 index per output for that, four times the
output in bf16. Here x alone is kept; the backward finds the taps again as bytes, R*S values and one for "none":

    taps    for each window: number r*S + s of the tap that holds its maximum
    dx      for each pixel: sum of dy over the windows whose tap it is, in row-major order: no atomics

Where x was made by a ReLU or ReLU6, its slope can be applied in passing (`mask_act`): a window's gradient goes to a
pixel that equals its maximum, so a maximum of slope zero makes the window's tap "none", and nothing more is read.

    global_sum[n, c] = sum over h, w of  x[n, c, h, w]

in float32 (float64 for float64), split among programs whose partial sums are added in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import MASKS, slope, slope_reference
from .choice import run_fastest
from .dtypes import accumulator
from .pointwise import fold, in_vectors, tile_offsets, tile_pixels, tile_shape, tiles_of, tiles_per_program
from .windows import empty_map, nhwc, output_size

NO_TAP = tl.constexpr(255)


@triton.jit
def _max_pool2d_kernel(
    x_ptr,
    y_ptr,
    tap_ptr,
    x_strides,
    y_strides,
    t_strides,  # of image, row and pixel, in vectors
    H,
    W,
    OH,
    OW,
    CV: tl.int64,
    blocks,  # rows and columns of x and of y, vectors and blocks of channels
    top,
    left,
    stride_h,
    stride_w,
    dil_h,
    dil_w,
    HAS_Y: tl.constexpr,
    HAS_TAP: tl.constexpr,
    MASK: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    VEC: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    n, i, j, inside = tile_pixels(pid // blocks, OH, OW, BH, BW)
    c = (pid % blocks).to(tl.int64) * BC + tl.arange(0, BC)
    wanted = (c < CV * VEC)[None, :]
    keep = inside[:, None] & wanted

    # A window of -inf gives its gradient to its first tap inside the map.
    h0, w0 = i * stride_h - top, j * stride_w - left
    r0, s0 = tl.cdiv(tl.maximum(-h0, 0), dil_h), tl.cdiv(tl.maximum(-w0, 0), dil_w)
    some = (r0 < R) & (s0 < S) & (h0 + r0 * dil_h < H) & (w0 + s0 * dil_w < W)
    tap = tl.where(some, r0 * S + s0, NO_TAP).to(tl.int32)[:, None] + tl.zeros((BH * BW, BC), tl.int32)
    best = tl.full((BH * BW, BC), float("-inf"), ACC)
    for r in range(R):
        h = h0 + r * dil_h
        for s in tl.static_range(S):
            w = w0 + s * dil_w
            hit = (inside & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & wanted
            at = tile_offsets(x_strides, n, h, w, c, VEC)
            value = tl.load(x_ptr + at, mask=hit, other=float("-inf")).to(ACC)  # [BH*BW, BC]
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            tap = tl.where(better, r * S + s, tap)
    if HAS_Y:
        tl.store(y_ptr + tile_offsets(y_strides, n, i, j, c, VEC), best.to(y_ptr.dtype.element_ty), mask=keep)
    if HAS_TAP:
        if MASK != "none":
            tap = tl.where(slope(best, MASK) != 0.0, tap, NO_TAP)
        tl.store(tap_ptr + tile_offsets(t_strides, n, i, j, c, VEC), tap.to(tl.uint8), mask=keep)


@triton.jit
def _max_pool2d_grad_kernel(
    dy_ptr,
    tap_ptr,
    dx_ptr,
    dy_strides,
    t_strides,
    dx_strides,  # of image, row and pixel, in vectors
    H,
    W,
    OH,
    OW,
    CV: tl.int64,
    blocks,  # rows and columns of x and of y, vectors and blocks of channels
    top,
    left,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    VEC: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    # Pixel (a*STRIDE_H + p - top, b*STRIDE_W + q - left): which taps may have chosen it depends on p and q alone.
    n, a, b, _ = tile_pixels(pid // blocks, tl.cdiv(H + top, STRIDE_H), tl.cdiv(W + left, STRIDE_W), BH, BW)
    c = (pid % blocks).to(tl.int64) * BC + tl.arange(0, BC)
    wanted = (c < CV * VEC)[None, :]
    for p in tl.static_range(STRIDE_H):
        for q in tl.static_range(STRIDE_W):
            dx = tl.zeros((BH * BW, BC), ACC)
            # Last taps first: theirs are the first windows, and that is the order in which PyTorch adds.
            for r in range(R - 1, -1, -1):
                if (p - r * DIL_H) % STRIDE_H == 0:
                    i = a + (p - r * DIL_H) // STRIDE_H
                    for s in tl.static_range(S - 1, -1, -1):
                        if (q - s * DIL_W) % STRIDE_W == 0:
                            j = b + (q - s * DIL_W) // STRIDE_W
                            hit = ((i >= 0) & (i < OH) & (j >= 0) & (j < OW))[:, None] & wanted
                            tap = tl.load(tap_ptr + tile_offsets(t_strides, n, i, j, c, VEC), mask=hit, other=NO_TAP)
                            dy = tl.load(dy_ptr + tile_offsets(dy_strides, n, i, j, c, VEC), mask=hit, other=0.0)
                            dx += tl.where(tap.to(tl.int32) == r * S + s, dy.to(ACC), 0.0)  # [BH*BW, BC]
            h, w = a * STRIDE_H + p - top, b * STRIDE_W + q - left
            keep = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & wanted
            tl.store(dx_ptr + tile_offsets(dx_strides, n, h, w, c, VEC), dx.to(dx_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _global_sum_kernel(
    x_ptr,
    part_ptr,  # [N, splits, C] partial sums
    x_strides,  # of image, row and pixel, in vectors
    H,
    W,
    CV: tl.int64,
    blocks,  # rows of an image, pixels of a row, vectors and blocks of channels
    tiles,
    tiles_each,  # of an image, and of one program
    VEC: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    pid, splits = tl.program_id(0), tl.cdiv(tiles, tiles_each)
    split, n = pid // blocks % splits, pid // blocks // splits
    c = (pid % blocks).to(tl.int64) * BC + tl.arange(0, BC)
    wanted = c < CV * VEC
    total = tl.zeros((BH * BW, BC), ACC)
    for tile in range(split * tiles_each, tl.minimum(split * tiles_each + tiles_each, tiles)):
        _, i, j, inside = tile_pixels(tile, H, W, BH, BW)
        at = tile_offsets(x_strides, n, i, j, c, VEC)
        total += tl.load(x_ptr + at, mask=inside[:, None] & wanted[None, :], other=0.0).to(ACC)
    tl.store(part_ptr + (n * splits + split).to(tl.int64) * (CV * VEC) + c, tl.sum(total, 0), mask=wanted)


def launch_max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    y: Tensor | None = None,
    taps: Tensor | None = None,
    mask_act: str = "none",
) -> None:
    """Write y and taps, those that are given.

    Args:
        x: (N, C, H, W) window.
        kernel, stride, dilation: (height, width).
        padding: (top, bottom, left, right) rows and columns of -inf around x.
        y, taps: windows of the output's size; taps are of dtype uint8.
        mask_act: activation whose slope the taps shall include, "none" or one of MASKS.
    """
    wanted = y if y is not None else taps
    if wanted is None or not wanted.numel():
        return
    n, c, oh, ow = wanted.shape
    _, _, h, w = x.shape
    (x_strides, y_strides, t_strides), vec = in_vectors(x, y, taps)
    block = tile_shape(oh, ow, min(c, 128), x.element_size(), rows=4)
    blocks = triton.cdiv(c, block[2])
    _max_pool2d_kernel[(tiles_of(n, oh, ow, block) * blocks,)](
        x,
        y,
        taps,
        x_strides,
        y_strides,
        t_strides,
        h,
        w,
        oh,
        ow,
        c // vec,
        blocks,
        padding[0],
        padding[2],
        *stride,
        *dilation,
        HAS_Y=y is not None,
        HAS_TAP=taps is not None,
        MASK=mask_act,
        R=kernel[0],
        S=kernel[1],
        VEC=vec,
        BH=block[0],
        BW=block[1],
        BC=block[2],
        ACC=accumulator(x.dtype),
    )


def launch_max_pool2d_backward(
    dy: Tensor,
    taps: Tensor,
    dx: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Write dx; every pixel of it, zero where no window chose it.

    Args:
        dy, taps: windows of the output's size.
        dx: (N, C, H, W) window.
    """
    if not dx.numel():
        return
    n, c, h, w = dx.shape
    _, _, oh, ow = dy.shape
    (dy_strides, t_strides, dx_strides), vec = in_vectors(dy, taps, dx)
    steps = triton.cdiv(h + padding[0], stride[0]), triton.cdiv(w + padding[2], stride[1])
    block = tile_shape(*steps, min(c, 128), dy.element_size(), rows=4)
    blocks = triton.cdiv(c, block[2])
    _max_pool2d_grad_kernel[(tiles_of(n, *steps, block) * blocks,)](
        dy,
        taps,
        dx,
        dy_strides,
        t_strides,
        dx_strides,
        h,
        w,
        oh,
        ow,
        c // vec,
        blocks,
        padding[0],
        padding[2],
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        DIL_H=dilation[0],
        DIL_W=dilation[1],
        R=kernel[0],
        S=kernel[1],
        VEC=vec,
        BH=block[0],
        BW=block[1],
        BC=block[2],
        ACC=accumulator(dy.dtype),
    )


def launch_global_sum(x: Tensor) -> Tensor:
    """The sum over all pixels of a window, (N, C) in float32 (float64 for float64)."""
    images, channels = x.shape[:2]
    if not x.numel():
        return _sums(x).zero_()
    (n, h, w, c), (strides,), vec = fold(x, channels=False, images=False)
    block = tile_shape(h, w, channels, x.element_size())
    tiles = tiles_of(1, h, w, block)
    each = tiles_per_program(n * tiles)
    splits, blocks = triton.cdiv(tiles, each), triton.cdiv(channels, block[2])
    parts = torch.empty(images, splits, channels, dtype=_sums(x).dtype, device=x.device)
    _global_sum_kernel[(n * splits * blocks,)](
        x,
        parts,
        strides,
        h,
        w,
        c,
        blocks,
        tiles,
        each,
        VEC=vec,
        BH=block[0],
        BW=block[1],
        BC=block[2],
        ACC=accumulator(x.dtype),
    )
    return parts.sum(1)


def max_pool2d_reference(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """y in plain PyTorch; autograd gives dx."""
    top, bottom, left, right = padding
    x = F.pad(x, [left, right, top, bottom], value=float("-inf"))
    return F.max_pool2d(x, tuple(kernel), tuple(stride), 0, tuple(dilation))


def max_pool2d_backward_reference(
    dy: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask_act: str = "none",
) -> Tensor:
    """dx in plain PyTorch."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(max_pool2d_reference(x, kernel, stride, padding, dilation), x, dy)
    return dx if mask_act == "none" else dx * slope_reference(x, mask_act)


def _output_shape(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    if kernel[0] * kernel[1] > 255:
        raise ValueError(f"max_pool2d: a window of {kernel[0]} x {kernel[1]}; windows have at most 255 taps here")
    n, c, h, w = x.shape
    oh = output_size(h, kernel[0], stride[0], dilation[0], padding[0], padding[1])
    ow = output_size(w, kernel[1], stride[1], dilation[1], padding[2], padding[3])
    if oh < 1 or ow < 1:
        raise ValueError(
            f"max_pool2d: a window of {kernel[0]} x {kernel[1]}, dilation {tuple(dilation)}, is larger than the map of "
            f"{h} x {w} with its padding; give a larger map"
        )
    return n, c, oh, ow


@torch.library.custom_op("gigamorph::max_pool2d", mutates_args=())
def max_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The maximum of each window; differentiable. Keeps x alone.

    Args:
        kernel, stride, dilation: (height, width).
        padding: (top, bottom, left, right) rows and columns of -inf around x.
    """
    x = nhwc(x)
    shape = _output_shape(x, kernel, stride, padding, dilation)

    def ours() -> Tensor:
        y = empty_map(*shape, x)
        launch_max_pool2d(x, kernel, stride, padding, dilation, y=y)
        return y

    def stock() -> Tensor:
        return nhwc(max_pool2d_reference(x, kernel, stride, padding, dilation))

    return run_fastest("max_pool2d", x, (*kernel, *stride, *padding, *dilation), ours, stock)


@max_pool2d.register_fake
def _(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    return empty_map(*_output_shape(x, kernel, stride, padding, dilation), x)


@torch.library.custom_op("gigamorph::max_pool2d_backward", mutates_args=())
def max_pool2d_backward(
    dy: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask_act: str = "none",
) -> Tensor:
    """The gradient of x, times the slope of the activation that made x (`mask_act`, one of MASKS)."""
    if mask_act not in MASKS and mask_act != "none":
        raise ValueError(f"max_pool2d_backward: x does not tell the slope of {mask_act!r}; apply it with act_grad")
    x = nhwc(x)
    n, c, oh, ow = _output_shape(x, kernel, stride, padding, dilation)
    if dy.shape != (n, c, oh, ow):
        raise ValueError(
            f"max_pool2d_backward: dy of {tuple(dy.shape)}; give the gradient of the output, {(n, c, oh, ow)}"
        )
    dy = nhwc(dy)

    def ours() -> Tensor:
        taps = torch.empty(n, oh, ow, c, dtype=torch.uint8, device=x.device).permute(0, 3, 1, 2)
        dx = empty_map(*x.shape, like=x)
        launch_max_pool2d(x, kernel, stride, padding, dilation, taps=taps, mask_act=mask_act)
        launch_max_pool2d_backward(dy, taps, dx, kernel, stride, padding, dilation)
        return dx

    def stock() -> Tensor:
        top, bottom, left, right = padding
        padded = F.pad(x, [left, right, top, bottom], value=float("-inf"))
        place = list(kernel), list(stride), [0, 0], list(dilation), False
        _, indices = torch.ops.aten.max_pool2d_with_indices(padded, *place)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dy, padded, *place, indices)
        dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        dx = dx.clone() if mask_act == "none" else dx * slope_reference(x, mask_act)
        return nhwc(dx)

    return run_fastest("max_pool2d_backward", x, (*kernel, *stride, *padding, *dilation, mask_act), ours, stock)


@max_pool2d_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask_act: str = "none",
) -> Tensor:
    return empty_map(*x.shape, like=x)


def _max_pool2d_context(ctx, inputs, output) -> None:
    x, *ctx.place = inputs
    ctx.save_for_backward(x)


def _max_pool2d_grad(ctx, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    return max_pool2d_backward(dy, *ctx.saved_tensors, *ctx.place), None, None, None, None


max_pool2d.register_autograd(_max_pool2d_grad, setup_context=_max_pool2d_context)


@torch.library.custom_op("gigamorph::global_sum", mutates_args=())
def global_sum(x: Tensor) -> Tensor:
    """The sum over all pixels, (N, C) in float32 (float64 for float64); differentiable."""
    return launch_global_sum(nhwc(x))


@global_sum.register_fake
def _(x: Tensor) -> Tensor:
    return _sums(x)


def _sums(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _global_sum_context(ctx, inputs, output) -> None:
    (x,) = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _global_sum_grad(ctx, total: Tensor) -> Tensor:
    return total.to(ctx.dtype)[:, :, None, None].expand(ctx.shape)


global_sum.register_autograd(_global_sum_grad, setup_context=_global_sum_context)


def global_sum_reference(x: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    return x.sum((2, 3), dtype=_sums(x).dtype)
