"""Layer normalisation over the channels of each pixel of a map, as in ConvNeXt:

    xhat = (x - mean) * rstd,   mean = sum_c x / C,   rstd = (sum_c (x - mean)^2 / C + eps)^(-1/2)
    y = xhat * weight + bias

and its gradients, with g = dy * weight:

    dx = rstd * (g - mean_c(g) - xhat * mean_c(g * xhat)),   dweight = sum over pixels of dy * xhat,   dbias = sum of dy

Only x is saved for the backward: a program holds all channels of its pixels in registers, so computing mean and rstd
again costs no memory traffic. The sum of squares uses centred values, which cannot cancel.

Each program sums over its pixels by row of a tile, and the programs' sums are added in a fixed order: two runs agree
bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .choice import run_fastest
from .dtypes import promoted, sum_dtype
from .stream import SHARE, Share, Stream, channel, load, step_pixels, store, whole
from .tiles import MOST_NORM_CHANNELS
from .triton_private import jit_kernel
from .tuning import roomy_registers
from .windows import map_like, nhwc


@triton.jit
def _normalise(x, wanted, C, EPS: tl.constexpr):
    """xhat and rstd of the rows of x; unwanted channels of x and xhat are zero."""
    centred = tl.where(wanted, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)[:, None]
    return centred * rstd, rstd


@jit_kernel(SHARE)
def _layer_norm_kernel(
    x,  # map [N, C, H, W]
    y,  # map [N, C, H, W]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    pixels,
    H,
    W,
    C,
    period,
    steps,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """y = xhat * weight + bias; a program normalises its share of the pixels, all channels at once."""
    C = whole(C, TILE.VEC)
    share = Share(pixels, H, W, C, period, steps)
    c = tl.arange(0, TILE.BC)
    wanted = (c < C)[None, :]
    if weight_ptr is not None:
        weight = channel(weight_ptr, c, C, TILE.ACC)
    if bias_ptr is not None:
        bias = channel(bias_ptr, c, C, TILE.ACC)
    for step in range(share.steps):
        p = step_pixels(share, step, TILE)
        keep = (p < share.pixels)[:, None] & wanted
        values, _ = _normalise(load(x, p, c, keep, share, TILE), wanted, C, EPS)  # [BM, BC]
        if weight_ptr is not None:
            values *= weight
        if bias_ptr is not None:
            values += bias
        store(y, p, c, keep, values, share, TILE)


@jit_kernel(SHARE)
def _layer_norm_backward_kernel(
    dy,  # map [N, C, H, W]
    x,  # map [N, C, H, W]
    dx,  # map [N, C, H, W]
    weight_ptr,  # [C] or None
    sums_ptr,  # [programs, 2, C], of dy * xhat and of dy
    pixels,
    H,
    W,
    C,
    period,
    steps,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx = rstd * (g - mean_c(g) - xhat * mean_c(g * xhat)); a program also sums dy * xhat and dy over its pixels."""
    C = whole(C, TILE.VEC)
    share = Share(pixels, H, W, C, period, steps)
    c = tl.arange(0, TILE.BC)
    wanted = (c < C)[None, :]
    if weight_ptr is not None:
        weight = channel(weight_ptr, c, C, TILE.ACC)
    BM: tl.constexpr = TILE.BM
    BC: tl.constexpr = TILE.BC
    dweight = tl.zeros((BM, BC), TILE.ACC)
    dbias = tl.zeros((BM, BC), TILE.ACC)
    for step in range(share.steps):
        p = step_pixels(share, step, TILE)
        keep = (p < share.pixels)[:, None] & wanted
        xhat, rstd = _normalise(load(x, p, c, keep, share, TILE), wanted, C, EPS)
        g = load(dy, p, c, keep, share, TILE)
        dweight += g * xhat
        dbias += g
        if weight_ptr is not None:
            g *= weight
        values = rstd * (g - (tl.sum(g, 1) / C)[:, None] - xhat * (tl.sum(g * xhat, 1) / C)[:, None])
        store(dx, p, c, keep, values, share, TILE)
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(row + c, tl.sum(dweight, 0), mask=c < C)
    tl.store(row + C + c, tl.sum(dbias, 0), mask=c < C)


def _stream(*maps: Tensor) -> Stream:
    channels = maps[0].shape[1]
    if channels > MOST_NORM_CHANNELS:
        raise ValueError(f"layer_norm: {channels} channels; use at most {MOST_NORM_CHANNELS}")
    return Stream("layer_norm", MOST_NORM_CHANNELS, *maps)


def launch_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor) -> None:
    """Write y.

    Args:
        x, y: (N, C, H, W) windows.
        weight, bias: (C,), of any floating dtype.
    """
    if x.numel():
        _stream(x, y).launch(_layer_norm_kernel, weight, bias, EPS=eps, **roomy_registers(x.device, 128))


def launch_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Write dx; return dweight and dbias, (C,) in float32 (float64 for float64).

    Args:
        dy, x, dx: (N, C, H, W) windows; dx may be dy.
    """
    if not x.numel():
        return x.new_zeros(x.shape[1], dtype=sum_dtype(x.dtype)), x.new_zeros(x.shape[1], dtype=sum_dtype(x.dtype))
    s = _stream(x, dy, dx)
    s.maps = s.maps[1], s.maps[0], s.maps[2]  # in the order of the kernel
    sums = s.sums(x, 2)
    s.launch(_layer_norm_backward_kernel, weight, sums, EPS=eps)
    return sums[:, 0].sum(0), sums[:, 1].sum(0)


@torch.library.custom_op("gigamorph::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """(x - mean) * rstd * weight + bias at each pixel, over its channels.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
        weight, bias: (C,), of any floating dtype, or None.
        dtype: the dtype of the result, which is rounded once at the end; None for that of x.

    Returns:
        (N, C, H, W) in channels-last memory.
    """
    x, dtype = nhwc(x), dtype or x.dtype

    def ours() -> Tensor:
        y = map_like(x, dtype)
        launch_forward(x, weight, bias, eps, y)
        return y

    def stock() -> Tensor:
        wide = torch.promote_types(dtype, promoted(x, weight, bias))
        affine = (None if t is None else t.to(wide) for t in (weight, bias))
        with torch.autocast(x.device.type, enabled=False):  # autocast would make float32 maps
            return layer_norm_reference(x.to(wide), *affine, eps).to(dtype)

    return run_fastest("layer_norm", x, (weight is None, bias is None, str(dtype)), ours, stock)


@layer_norm.register_fake
def _(x, weight, bias, eps, dtype=None):
    return map_like(x, dtype)


@torch.library.custom_op("gigamorph::layer_norm_backward", mutates_args=())
def layer_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the last two in float32 (float64 for float64), with or without a weight."""
    dy, x = nhwc(dy), nhwc(x)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        dx = map_like(x)
        dweight, dbias = launch_backward(dy, x, weight, eps, dx)
        return dx, dweight, dbias

    def stock() -> tuple[Tensor, Tensor, Tensor]:
        wide, sums, shape = promoted(dy, x, weight), sum_dtype(x.dtype), [x.shape[1]]
        rows, dys = (t.to(wide).permute(0, 2, 3, 1) for t in (x, dy))
        w = x.new_ones(shape, dtype=wide) if weight is None else weight.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            _, mean, rstd = torch.ops.aten.native_layer_norm(rows, shape, w, w, eps)
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dys, rows, shape, mean, rstd, w, w, [True, True, True]
        )
        return nhwc(dx.to(x.dtype).permute(0, 3, 1, 2)), dweight.to(sums), dbias.to(sums)

    return run_fastest("layer_norm_backward", x, (weight is None, str(dy.dtype)), ours, stock)


@layer_norm_backward.register_fake
def _(dy, x, weight, eps):
    dweight, dbias = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return map_like(x), dweight, dbias


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y in plain PyTorch."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)
