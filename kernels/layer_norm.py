"""Layer normalisation over the channels of a map, as ConvNeXt does it at each pixel:

    xhat = (x - mean) * rstd,   mean = sum_c x / C,   rstd = (sum_c (x - mean)^2 / C + eps)^(-1/2)
    y = xhat * weight + bias

and its gradients, with g = dy * weight:

    dx = rstd * (g - mean_c(g) - xhat * mean_c(g * xhat)),   dweight = sum over pixels of dy * xhat,   dbias = sum of dy

Nothing but x is kept for the backward: a program holds all channels of its pixels in registers, so computing mean and
rstd again costs no memory traffic, and the sum of squares is taken of centred values, which cannot cancel.

The sums over pixels are held per row of a tile, added up within a program, and the programs' parts are added in order:
two runs agree bit by bit.

`layer_norm_linear_act` is what follows it in a ConvNeXt block in the same kernel, act(layer_norm(x) w + b): a matrix
product that normalises x as it loads it, so the normalised map is never written. x is read once more for mean and rstd;
the product reads it through the cache. Its backward computes the product again and keeps nothing but x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import ACTIVATIONS, activate, activate_reference
from .conv2d import conv2d_dgrad, conv2d_wgrad_
from .dtypes import accumulator, dot_precision, sum_dtype
from .tuning import Config, forced_config, interpreting, matmul_config, power_of_two
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
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    x_sn: tl.int64, x_sh: tl.int64, x_sw: tl.int64,  # strides of image, row, pixel; channels have stride 1
    y_sn: tl.int64, y_sh: tl.int64, y_sw: tl.int64,
    pixels, H, W, C, steps,  # steps: tiles of BM pixels per program
    EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, FLAT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
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
    dy_ptr, x_ptr, weight_ptr, dx_ptr, sums_ptr,  # sums: [programs, 2, C], of dy * xhat and of dy
    dy_sn: tl.int64, dy_sh: tl.int64, dy_sw: tl.int64,
    x_sn: tl.int64, x_sh: tl.int64, x_sw: tl.int64,
    dx_sn: tl.int64, dx_sh: tl.int64, dx_sw: tl.int64,
    pixels, H, W, C, steps,
    EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, FLAT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
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
        x, weight, bias, y, *spatial_strides(x), *spatial_strides(y), pixels, x.shape[2], x.shape[3], x.shape[1],
        config.steps, EPS=eps, BM=config.block_m, BC=config.block_c, FLAT=is_flat(x, y), HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, ACC=accumulator(x.dtype), num_warps=config.num_warps,
    )  # fmt: skip


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
        dy, x, weight, dx, sums, *spatial_strides(dy), *spatial_strides(x), *spatial_strides(dx),
        pixels, x.shape[2], x.shape[3], channels, config.steps, EPS=eps, BM=config.block_m, BC=config.block_c,
        FLAT=is_flat(dy, x, dx), HAS_WEIGHT=weight is not None, ACC=accumulator(x.dtype), num_warps=config.num_warps,
    )  # fmt: skip
    return sums[:, 0].sum(0), sums[:, 1].sum(0)


@torch.library.custom_op("gigamorph::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) * rstd * weight + bias at each pixel, over its channels; differentiable.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
        weight, bias: (C,), or None.

    Returns:
        (N, C, H, W) in channels-last memory, of x's dtype.
    """
    x = nhwc(x)
    y = empty_map(*x.shape, x)
    launch_forward(x, weight, bias, eps, y)
    return y


@layer_norm.register_fake
def _(x, weight, bias, eps):
    return empty_map(*x.shape, x)


@torch.library.custom_op("gigamorph::layer_norm_backward", mutates_args=())
def layer_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the last two in float32 (float64 for float64), with or without a weight."""
    dy, x = nhwc(dy), nhwc(x)
    dx = empty_map(*x.shape, x)
    dweight, dbias = launch_backward(dy, x, weight, eps, dx)
    return dx, dweight, dbias


@layer_norm_backward.register_fake
def _(dy, x, weight, eps):
    dweight, dbias = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return empty_map(*x.shape, x), dweight, dbias


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = layer_norm_backward(dy, x, weight, ctx.eps)
    return (
        dx, None if weight is None else dweight.to(weight.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None,
    )  # fmt: skip


layer_norm.register_autograd(_backward, setup_context=_save)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y in plain PyTorch."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)


# -- followed by a 1x1 convolution --------------------------------------------------------------------------------


@triton.jit
def _layer_norm_linear_kernel(
    x_ptr, ln_weight_ptr, ln_bias_ptr, w_ptr, bias_ptr, y_ptr,  # w: [K, C]
    x_sn: tl.int64, x_sh: tl.int64, x_sw: tl.int64,
    y_sn: tl.int64, y_sh: tl.int64, y_sw: tl.int64,
    pixels, H, W, C, K, columns,  # columns: output channels of a program, a multiple of BN
    EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FLAT: tl.constexpr,
    HAS_LN_WEIGHT: tl.constexpr, HAS_LN_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM] pixels
    inside = (p < pixels)[:, None]
    x_rows = x_ptr + pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None]
    y_rows = y_ptr + pixel_offsets(p, H, W, y_sn, y_sh, y_sw, FLAT)[:, None]
    mean = tl.zeros((BM,), ACC)
    m2 = tl.zeros((BM,), ACC)
    for c0 in range(0, C, BK):  # blocks of channels merge by Chan's formula
        c = (c0 + tl.arange(0, BK))[None, :]
        n = tl.minimum(C - c0, BK)
        x = tl.load(x_rows + c, mask=inside & (c < C), other=0.0).to(ACC)  # [BM, BK]
        part = tl.sum(x, 1) / n
        centred = tl.where(c < C, x - part[:, None], 0.0)
        delta = part - mean
        mean += delta * n / (c0 + n)
        m2 += tl.sum(centred * centred, 1) + delta * delta * (c0 * n) / (c0 + n)
    mean = mean[:, None]
    rstd = tl.rsqrt(m2 / C + EPS)[:, None]

    first = tl.program_id(1) * columns
    for k0 in range(first, tl.minimum(first + columns, K), BN):
        k = k0 + tl.arange(0, BN)
        acc = tl.zeros((BN, BM), ACC)
        for c0 in range(0, C, BK):
            c = c0 + tl.arange(0, BK)
            wanted = c < C
            a = tl.load(x_rows + c[None, :], mask=inside & wanted[None, :], other=0.0).to(ACC)
            a = (a - mean) * rstd
            if HAS_LN_WEIGHT:
                a *= tl.load(ln_weight_ptr + c, mask=wanted, other=0.0).to(ACC)[None, :]
            if HAS_LN_BIAS:
                a += tl.load(ln_bias_ptr + c, mask=wanted, other=0.0).to(ACC)[None, :]
            w = tl.load(w_ptr + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & wanted[None, :], other=0.0)
            # Computed values are the right operand: Hopper reads left ones from registers while it multiplies, and
            # Triton (3.6, 3.7) may overwrite those too early (triton-lang/triton#9433).
            acc = tl.dot(w, a.to(w_ptr.dtype.element_ty).T, acc, input_precision=PRECISION, out_dtype=ACC)
        z = acc.T  # [BM, BN]
        k = k[None, :]
        if HAS_BIAS:
            z += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(ACC)
        tl.store(y_rows + k, activate(z, ACT).to(y_ptr.dtype.element_ty), mask=inside & (k < K))


def linear_config(device: torch.device, dtype: torch.dtype, pixels: int, filters: int, channels: int) -> Config:
    """The tile of the product: small enough for two blocks per multiprocessor.

    A block does three things in turn (statistics, products, activations) of which each leaves something idle; the other
    block fills it. Thirty-two channels at a time waste nothing of the widths 96, 192, 384 and 768.
    """
    if interpreting() or forced_config() is not None:
        return matmul_config(device, dtype, pixels, filters, channels, described=False)
    return Config("pointer", 64, power_of_two(filters, 16, 128 if dtype.itemsize <= 2 else 64), 32, 4, 3)


def launch_linear_act(
    x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    act: str, y: Tensor,
) -> None:  # fmt: skip
    """Write y = act(layer_norm(x) weight^T + bias) at each pixel.

    Args:
        x, y: (N, C, H, W) and (N, K, H, W) windows.
        ln_weight, ln_bias: (C,), of any floating dtype.
        weight: (K, C), dense, of x's dtype.
        bias: (K,), of any floating dtype.
    """
    if not y.numel():
        return
    pixels, channels, filters = count_pixels(x, "layer_norm_linear_act"), x.shape[1], y.shape[1]
    config = linear_config(x.device, x.dtype, pixels, filters, channels)
    rows, blocks = triton.cdiv(pixels, config.block_m), triton.cdiv(filters, config.block_n)
    # One program takes all columns, so that statistics are computed once, unless that leaves the chip idle.
    programs = 1 if interpreting() else 264
    columns = triton.cdiv(blocks, min(blocks, triton.cdiv(programs, rows))) * config.block_n
    _layer_norm_linear_kernel[(rows, triton.cdiv(filters, columns))](
        x, ln_weight, ln_bias, weight, bias, y, *spatial_strides(x), *spatial_strides(y), pixels, x.shape[2],
        x.shape[3], channels, filters, columns, EPS=eps, BM=config.block_m, BN=config.block_n, BK=config.block_k,
        FLAT=is_flat(x, y), HAS_LN_WEIGHT=ln_weight is not None, HAS_LN_BIAS=ln_bias is not None,
        HAS_BIAS=bias is not None, ACT=act, PRECISION=dot_precision(x.dtype), ACC=accumulator(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def layer_norm_linear_act(
    x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    """act(layer_norm(x) weight^T + bias) at each pixel, one pass over memory; differentiable, only x is kept.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
        ln_weight, ln_bias: (C,), or None.
        weight: (K, C) or (K, C, 1, 1), of x's dtype.
        bias: (K,), or None.
        act: "none", "relu", "relu6", "silu", "gelu" or "hardswish".

    Returns:
        (N, K, H, W) in channels-last memory.

    Raises:
        ValueError: for an unknown activation or shapes that do not fit.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"layer_norm_linear_act: unknown activation {act!r}; use one of {', '.join(ACTIVATIONS)}")
    if weight[0].numel() != x.shape[1]:
        raise ValueError(f"layer_norm_linear_act: weight {tuple(weight.shape)} does not fit {x.shape[1]} channels")
    return _layer_norm_linear_act(x, ln_weight, ln_bias, eps, weight.flatten(1), bias, act)


@torch.library.custom_op("gigamorph::layer_norm_linear_act", mutates_args=())
def _layer_norm_linear_act(
    x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    x = nhwc(x)
    y = empty_map(x.shape[0], weight.shape[0], x.shape[2], x.shape[3], x)
    launch_linear_act(x, ln_weight, ln_bias, eps, weight.contiguous(), bias, act, y)
    return y


@_layer_norm_linear_act.register_fake
def _(x, ln_weight, ln_bias, eps, weight, bias, act):
    return empty_map(x.shape[0], weight.shape[0], x.shape[2], x.shape[3], x)


def _save_linear(ctx, inputs, output) -> None:
    x, ln_weight, ln_bias, ctx.eps, weight, bias, ctx.act = inputs
    ctx.save_for_backward(x, ln_weight, ln_bias, weight, bias)


def _backward_linear(ctx, dy):
    x, ln_weight, ln_bias, weight, bias = ctx.saved_tensors
    n = layer_norm(x, ln_weight, ln_bias, ctx.eps)
    filters = weight[:, :, None, None]
    gate = None
    if ctx.act != "none":
        gate = _layer_norm_linear_act(x, ln_weight, ln_bias, ctx.eps, weight, bias, "none")
    place = [1, 1], [0, 0, 0, 0], [1, 1], 1
    dw = torch.zeros_like(filters, dtype=sum_dtype(x.dtype))
    dshift = torch.zeros(weight.shape[0], dtype=sum_dtype(x.dtype), device=x.device)
    conv2d_wgrad_(dw, dshift, n, dy, gate, ctx.act, *place)
    dn = conv2d_dgrad(dy, filters, None, gate, ctx.act, None, None, "none", x.shape[2:], *place)
    dx, dln_weight, dln_bias = layer_norm_backward(dn, x, ln_weight, ctx.eps)
    sums = (dln_weight, dln_bias, dw[:, :, 0, 0], dshift)
    parameters = (ln_weight, ln_bias, weight, bias)
    dln_weight, dln_bias, dweight, dbias = (
        None if t is None else s.to(t.dtype) for s, t in zip(sums, parameters, strict=True)
    )
    return dx, dln_weight, dln_bias, None, dweight, dbias, None


_layer_norm_linear_act.register_autograd(_backward_linear, setup_context=_save_linear)


def layer_norm_linear_act_reference(
    x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    """y in plain PyTorch."""
    n = layer_norm_reference(x, ln_weight, ln_bias, eps)
    return activate_reference(F.conv2d(n, weight.reshape(weight.shape[0], -1, 1, 1), bias), act)
