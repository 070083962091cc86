"""Layer normalisation over the channels of a map, as ConvNeXt does it at each pixel:

    xhat = (x - mean) * rstd,   mean = sum_c x / C,   rstd = (sum_c (x - mean)^2 / C + eps)^(-1/2)
    y = xhat * weight + bias

and its gradients, with g = dy * weight:

    dx = rstd * (g - mean_c(g) - xhat * mean_c(g * xhat)),   dweight = sum over pixels of dy * xhat,   dbias = sum of dy

Nothing but x is kept for the backward: a program holds all channels of its pixels in registers, so computing mean and
rstd again costs no memory traffic, and the sum of squares is taken of centred values, which cannot cancel.

The sums over pixels are held per row of a tile, added up within a program, and the programs' parts are added in order:
two runs agree bit by bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .choice import run_fastest
from .dtypes import accumulator, sum_dtype
from .tuning import interpreting, power_of_two
from .windows import empty_map, nhwc, spatial_strides

MOST_CHANNELS = 8192  # one program holds them all in registers


@triton.jit
def pixel_offsets(p, H, W, sn, sh, sw, FLAT: tl.constexpr):
    """Where pixels p = (n*H + i)*W + j of a map begin; FLAT if they all lie `sw` apart."""
    if FLAT:
        offsets = p.to(tl.int64) * sw
    else:
        offsets = (p // (H * W)).to(tl.int64) * sn + (p // W % H).to(tl.int64) * sh + (p % W).to(tl.int64) * sw
    return offsets


@triton.jit
def _normalise(x, wanted, C, EPS: tl.constexpr):
    """xhat and rstd of the rows of x; unwanted channels of x and xhat are zero."""
    centred = tl.where(wanted, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)[:, None]
    return centred * rstd, rstd


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,  # strides of image, row, pixel; channels have stride 1
    y_sn: tl.int64,
    y_sh: tl.int64,
    y_sw: tl.int64,
    pixels,
    H,
    W,
    C,
    steps,  # steps: tiles of BM pixels per program
    EPS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.arange(0, BC)[None, :]
    wanted = c < C
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + c, mask=wanted, other=0.0).to(ACC)  # [1, BC]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=wanted, other=0.0).to(ACC)  # [1, BC]
    first = tl.program_id(0) * steps * BM
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)  # [BM]
        keep = (p < pixels)[:, None] & wanted
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c
        y, _ = _normalise(tl.load(x_ptr + at, mask=keep, other=0.0).to(ACC), wanted, C, EPS)  # [BM, BC]
        if HAS_WEIGHT:
            y *= weight
        if HAS_BIAS:
            y += bias
        at = pixel_offsets(p, H, W, y_sn, y_sh, y_sw, FLAT)[:, None] + c
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _layer_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    sums_ptr,  # sums: [programs, 2, C], of dy * xhat and of dy
    dy_sn: tl.int64,
    dy_sh: tl.int64,
    dy_sw: tl.int64,
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,
    dx_sn: tl.int64,
    dx_sh: tl.int64,
    dx_sw: tl.int64,
    pixels,
    H,
    W,
    C,
    steps,
    EPS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.arange(0, BC)[None, :]
    wanted = c < C
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + c, mask=wanted, other=0.0).to(ACC)
    dweight = tl.zeros((BM, BC), ACC)
    dbias = tl.zeros((BM, BC), ACC)
    first = tl.program_id(0) * steps * BM
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)
        keep = (p < pixels)[:, None] & wanted
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c
        xhat, rstd = _normalise(tl.load(x_ptr + at, mask=keep, other=0.0).to(ACC), wanted, C, EPS)
        at = pixel_offsets(p, H, W, dy_sn, dy_sh, dy_sw, FLAT)[:, None] + c
        g = tl.load(dy_ptr + at, mask=keep, other=0.0).to(ACC)
        dweight += g * xhat
        dbias += g
        if HAS_WEIGHT:
            g *= weight
        dx = rstd * (g - (tl.sum(g, 1) / C)[:, None] - xhat * (tl.sum(g * xhat, 1) / C)[:, None])
        at = pixel_offsets(p, H, W, dx_sn, dx_sh, dx_sw, FLAT)[:, None] + c
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)
    c = tl.arange(0, BC)
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(row + c, tl.sum(dweight, 0), mask=c < C)
    tl.store(row + C + c, tl.sum(dbias, 0), mask=c < C)


@dataclass(frozen=True)
class Stream:
    """How programs share the pixels of a map: each takes `steps` tiles of block_m pixels x block_c channels."""

    block_m: int
    block_c: int
    steps: int
    num_warps: int

    @property
    def share(self) -> int:
        """Pixels of a program."""
        return self.block_m * self.steps

    def programs(self, pixels: int) -> int:
        return -(-pixels // self.share)


def stream_config(pixels: int, channels: int, most_channels: int) -> Stream:
    """The tile of a kernel that streams through a map.

    Sixteen elements per thread: two of them held for sums leave room for as many blocks as hide the memory's latency.
    About two thousand programs; at most 1024 tiles each, so that a sum has few terms before it is added to others.
    """
    block_c = power_of_two(channels, 4, most_channels)
    num_warps = min(16, max(4, block_c // 512))
    block_m = max(1, num_warps * 512 // block_c)
    programs = 2048
    if interpreting():  # few large programs: a call costs more than its elements
        block_m, programs = max(1, 16384 // block_c), 2
    tiles = -(-pixels // block_m) * -(-channels // block_c)
    return Stream(block_m, block_c, min(1024, -(-tiles // programs)), num_warps)


def is_flat(*maps: Tensor | None) -> bool:
    """Whether in each map the pixels of all images lie equally far apart."""
    return all(
        (x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3))
        and (x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.shape[3] * x.stride(3))
        for x in maps
        if x is not None
    )


def count_pixels(x: Tensor, op: str) -> int:
    """Pixels of a map; programs number them with 32 bits."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if pixels >= 2**31 - 2**27:
        raise ValueError(f"{op}: a map of {pixels} pixels is too large for one launch; use smaller tiles")
    return pixels


def _config(x: Tensor) -> tuple[int, Stream]:
    channels = x.shape[1]
    if channels > MOST_CHANNELS:
        raise ValueError(f"layer_norm: {channels} channels; use at most {MOST_CHANNELS}")
    pixels = count_pixels(x, "layer_norm")
    return pixels, stream_config(pixels, channels, MOST_CHANNELS)


def launch_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor) -> None:
    """Write y.

    Args:
        x, y: (N, C, H, W) windows.
        weight, bias: (C,), of any floating dtype.
    """
    if not x.numel():
        return
    pixels, config = _config(x)
    _layer_norm_kernel[(config.programs(pixels),)](
        x,
        weight,
        bias,
        y,
        *spatial_strides(x),
        *spatial_strides(y),
        pixels,
        x.shape[2],
        x.shape[3],
        x.shape[1],
        config.steps,
        EPS=eps,
        BM=config.block_m,
        BC=config.block_c,
        FLAT=is_flat(x, y),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
    )


def launch_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Write dx; return dweight and dbias, (C,) in float32 (float64 for float64).

    Args:
        dy, x, dx: (N, C, H, W) windows; dx may be dy.
    """
    channels = x.shape[1]
    if not x.numel():
        return x.new_zeros(channels, dtype=sum_dtype(x.dtype)), x.new_zeros(channels, dtype=sum_dtype(x.dtype))
    pixels, config = _config(x)
    programs = config.programs(pixels)
    sums = torch.empty(programs, 2, channels, dtype=sum_dtype(x.dtype), device=x.device)
    _layer_norm_backward_kernel[(programs,)](
        dy,
        x,
        weight,
        dx,
        sums,
        *spatial_strides(dy),
        *spatial_strides(x),
        *spatial_strides(dx),
        pixels,
        x.shape[2],
        x.shape[3],
        channels,
        config.steps,
        EPS=eps,
        BM=config.block_m,
        BC=config.block_c,
        FLAT=is_flat(dy, x, dx),
        HAS_WEIGHT=weight is not None,
        ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
    )
    return sums[:, 0].sum(0), sums[:, 1].sum(0)


@torch.library.custom_op("gigamorph::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """(x - mean) * rstd * weight + bias at each pixel, over its channels; differentiable.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
        weight, bias: (C,), of any floating dtype, or None.
        dtype: of the result; None for that of x. It is rounded to once, at the end.

    Returns:
        (N, C, H, W) in channels-last memory.
    """
    x, dtype = nhwc(x), dtype or x.dtype

    def ours() -> Tensor:
        y = _map_like(x, dtype)
        launch_forward(x, weight, bias, eps, y)
        return y

    def stock() -> Tensor:
        wide = torch.promote_types(dtype, _promoted(x, weight, bias))
        affine = (None if t is None else t.to(wide) for t in (weight, bias))
        with torch.autocast(x.device.type, enabled=False):  # it would make float32 maps
            rows = F.layer_norm(x.to(wide).permute(0, 2, 3, 1), x.shape[1:2], *affine, eps)
        return rows.to(dtype).permute(0, 3, 1, 2)

    return run_fastest("layer_norm", x, (weight is None, bias is None, str(dtype)), ours, stock)


def _map_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    n, c, h, w = x.shape
    return torch.empty(n, h, w, c, dtype=dtype, device=x.device).permute(0, 3, 1, 2)


def _promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which PyTorch computes with all of them."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


@layer_norm.register_fake
def _(x, weight, bias, eps, dtype=None):
    return _map_like(x, dtype or x.dtype)


@torch.library.custom_op("gigamorph::layer_norm_backward", mutates_args=())
def layer_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the last two in float32 (float64 for float64), with or without a weight."""
    dy, x = nhwc(dy), nhwc(x)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        dx = empty_map(*x.shape, x)
        dweight, dbias = launch_backward(dy, x, weight, eps, dx)
        return dx, dweight, dbias

    def stock() -> tuple[Tensor, Tensor, Tensor]:
        wide, sums, shape = _promoted(dy, x, weight), sum_dtype(x.dtype), [x.shape[1]]
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
    return empty_map(*x.shape, x), dweight, dbias


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = layer_norm_backward(dy, x, weight, ctx.eps)
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
        None,
    )


layer_norm.register_autograd(_backward, setup_context=_save)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y in plain PyTorch."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)
