"""Batch normalisation in training, in pieces that work on parts of a map (tiles), so that a map need not fit in memory:

    moments         mean = sum x / n,   m2 = sum (x - mean)^2                 of each channel of a window; windows merge
    normalize_act   y = act(z),   z = xhat * weight + bias + residual,   xhat = (x - mean) * rstd
    gradient_sums   dbias = sum dz,   dweight = sum dz * xhat,   dz = dy * act'(z)        these add over windows
    normalize_act_backward   dx = weight * rstd * (dz - dbias / n - xhat * dweight / n)

Each is one pass over memory. x (the raw output of the convolution) is all that is kept: z is computed again in
registers. Where a residual was added, `gate` stands for z: z itself, or y for ReLU and ReLU6.

Variances never come as E[x^2] - E[x]^2, which cancels. A program follows mean and m2 of each row of its tiles by
Welford's recurrence, and parts merge by Chan's formula, always in the same order: two runs agree bit by bit.

    delta = mean_b - mean_a,   mean = mean_a + delta * n_b/n,   m2 = m2_a + m2_b + delta^2 * n_a*n_b/n
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS, activate, activate_reference, slope, slope_reference
from .dtypes import accumulator, sum_dtype
from .layer_norm import Stream, count_pixels, is_flat, pixel_offsets, stream_config
from .tuning import interpreting, power_of_two
from .windows import empty_map, nhwc, spatial_strides

MOST_BLOCK_CHANNELS = 128  # 256 bytes of 16-bit channels lie side by side: whole cache lines

Moments = tuple[int, Tensor, Tensor]  # values per channel, their mean, the sum of their squared deviations from it


@triton.jit
def _merge_rows(count, mean, m2):
    """The moments of all rows together: counts [BM], mean and m2 [BM, BC] to [BC]."""
    total = tl.sum(count, 0)
    overall = tl.sum(count[:, None] * mean, 0) / total
    # Once more around the first result: sums of numbers far from zero have lost digits that the deviations need.
    overall += tl.sum(count[:, None] * (mean - overall[None, :]), 0) / total
    away = mean - overall[None, :]
    return overall, tl.sum(m2 + count[:, None] * away * away, 0)


@triton.jit
def _moments_kernel(
    x_ptr, mean_ptr, m2_ptr,  # parts: [programs, C]
    x_sn: tl.int64, x_sh: tl.int64, x_sw: tl.int64,  # strides of image, row, pixel; channels have stride 1
    pixels, H, W, C, steps,  # steps: tiles of BM pixels per program
    BM: tl.constexpr, BC: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(0) * steps * BM
    count = tl.zeros((BM,), ACC)
    mean = tl.zeros((BM, BC), ACC)
    m2 = tl.zeros((BM, BC), ACC)
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)
        inside = p < pixels
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c[None, :]
        x = tl.load(x_ptr + at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(ACC)  # [BM, BC]
        count += tl.where(inside, 1.0, 0.0).to(ACC)
        # Rows stand at one count until the map ends; from there on nothing changes them.
        weight = tl.where(inside, 1.0 / tl.maximum(count, 1.0), 0.0)[:, None]
        before = x - mean
        mean += before * weight
        m2 += tl.where(inside[:, None], before * (x - mean), 0.0)
    mean, m2 = _merge_rows(count, mean, m2)
    at = tl.program_id(0).to(tl.int64) * C + c
    tl.store(mean_ptr + at, mean, mask=c < C)
    tl.store(m2_ptr + at, m2, mask=c < C)


@triton.jit
def _merge_kernel(
    part_mean_ptr, part_m2_ptr, mean_ptr, m2_ptr,  # [parts, C], [parts, C], [C], [C]
    parts, share, pixels, C,  # every part but the last is of `share` pixels
    BM: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    count = tl.zeros((BM,), ACC)
    mean = tl.zeros((BM, BC), ACC)
    m2 = tl.zeros((BM, BC), ACC)
    for first in range(0, parts, BM):
        part = first + tl.arange(0, BM)
        n = tl.where(part < parts, tl.minimum(share, pixels - part * share), 0).to(ACC)
        at = part.to(tl.int64)[:, None] * C + c[None, :]
        keep = (part < parts)[:, None] & (c < C)[None, :]
        delta = tl.load(part_mean_ptr + at, mask=keep, other=0.0) - mean
        weight = n / tl.maximum(count + n, 1.0)
        mean += delta * weight[:, None]
        m2 += tl.load(part_m2_ptr + at, mask=keep, other=0.0) + delta * delta * (count * weight)[:, None]
        count += n
    mean, m2 = _merge_rows(count, mean, m2)
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(m2_ptr + c, m2, mask=c < C)


@triton.jit
def _channel(ptr, c, C, ACC: tl.constexpr):
    """One number per channel, [1, BC]."""
    return tl.load(ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]


@triton.jit
def _normalize_act_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    x_sn: tl.int64, x_sh: tl.int64, x_sw: tl.int64,
    r_sn: tl.int64, r_sh: tl.int64, r_sw: tl.int64,
    y_sn: tl.int64, y_sh: tl.int64, y_sw: tl.int64,
    pixels, H, W, C, steps,
    BM: tl.constexpr, BC: tl.constexpr, FLAT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, rstd = _channel(mean_ptr, c, C, ACC), _channel(rstd_ptr, c, C, ACC)
    scale = rstd * _channel(weight_ptr, c, C, ACC) if HAS_WEIGHT else rstd
    bias = _channel(bias_ptr, c, C, ACC) if HAS_BIAS else tl.zeros((1, BC), ACC)
    first = tl.program_id(0) * steps * BM
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)
        keep = (p < pixels)[:, None] & (c < C)[None, :]
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c[None, :]
        # Not x * scale + shift: with a mean far from zero that would cancel.
        z = (tl.load(x_ptr + at, mask=keep, other=0.0).to(ACC) - mean) * scale + bias
        if HAS_RESIDUAL:
            at = pixel_offsets(p, H, W, r_sn, r_sh, r_sw, FLAT)[:, None] + c[None, :]
            z += tl.load(residual_ptr + at, mask=keep, other=0.0).to(ACC)
        at = pixel_offsets(p, H, W, y_sn, y_sh, y_sw, FLAT)[:, None] + c[None, :]
        tl.store(y_ptr + at, activate(z, ACT).to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _slopes(
    dy, centred, scale, bias, gate_ptr, p, c, keep, H, W, g_sn, g_sh, g_sw, FLAT: tl.constexpr, HAS_GATE: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz = dy * act'(z), z from the gate or computed again just as in the forward, so that both see the same sign."""
    if HAS_GATE:
        at = pixel_offsets(p, H, W, g_sn, g_sh, g_sw, FLAT)[:, None] + c[None, :]
        z = tl.load(gate_ptr + at, mask=keep, other=0.0).to(ACC)
    else:
        z = centred * scale + bias
    return dy * slope(z, ACT)


@triton.jit
def _gradient_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, gate_ptr, sums_ptr,  # sums: [programs, 2, C]
    dy_sn: tl.int64, dy_sh: tl.int64, dy_sw: tl.int64,
    x_sn: tl.int64, x_sh: tl.int64, x_sw: tl.int64,
    g_sn: tl.int64, g_sh: tl.int64, g_sw: tl.int64,
    pixels, H, W, C, steps,
    BM: tl.constexpr, BC: tl.constexpr, FLAT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, rstd = _channel(mean_ptr, c, C, ACC), _channel(rstd_ptr, c, C, ACC)
    scale = rstd * _channel(weight_ptr, c, C, ACC) if HAS_WEIGHT else rstd
    bias = _channel(bias_ptr, c, C, ACC) if HAS_BIAS else tl.zeros((1, BC), ACC)
    dbias = tl.zeros((BM, BC), ACC)
    dweight = tl.zeros((BM, BC), ACC)
    first = tl.program_id(0) * steps * BM
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)
        keep = (p < pixels)[:, None] & (c < C)[None, :]
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c[None, :]
        centred = tl.load(x_ptr + at, mask=keep, other=0.0).to(ACC) - mean
        at = pixel_offsets(p, H, W, dy_sn, dy_sh, dy_sw, FLAT)[:, None] + c[None, :]
        dy = tl.load(dy_ptr + at, mask=keep, other=0.0).to(ACC)
        dz = _slopes(dy, centred, scale, bias, gate_ptr, p, c, keep, H, W, g_sn, g_sh, g_sw, FLAT, HAS_GATE, ACT, ACC)
        dbias += dz
        dweight += dz * (centred * rstd)
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(row + c, tl.sum(dbias, 0), mask=c < C)
    tl.store(row + C + c, tl.sum(dweight, 0), mask=c < C)


@triton.jit
def _normalize_act_backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, gate_ptr, mean_dz_ptr, mean_dz_xhat_ptr, dx_ptr, dz_ptr,
    dy_sn: tl.int64, dy_sh: tl.int64, dy_sw: tl.int64,
    x_sn: tl.int64, x_sh: tl.int64, x_sw: tl.int64,
    g_sn: tl.int64, g_sh: tl.int64, g_sw: tl.int64,
    dx_sn: tl.int64, dx_sh: tl.int64, dx_sw: tl.int64,
    dz_sn: tl.int64, dz_sh: tl.int64, dz_sw: tl.int64,
    pixels, H, W, C, steps,
    BM: tl.constexpr, BC: tl.constexpr, FLAT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_DZ: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, rstd = _channel(mean_ptr, c, C, ACC), _channel(rstd_ptr, c, C, ACC)
    scale = rstd * _channel(weight_ptr, c, C, ACC) if HAS_WEIGHT else rstd
    bias = _channel(bias_ptr, c, C, ACC) if HAS_BIAS else tl.zeros((1, BC), ACC)
    mean_dz, mean_dz_xhat = _channel(mean_dz_ptr, c, C, ACC), _channel(mean_dz_xhat_ptr, c, C, ACC)
    first = tl.program_id(0) * steps * BM
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)
        keep = (p < pixels)[:, None] & (c < C)[None, :]
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c[None, :]
        centred = tl.load(x_ptr + at, mask=keep, other=0.0).to(ACC) - mean
        at = pixel_offsets(p, H, W, dy_sn, dy_sh, dy_sw, FLAT)[:, None] + c[None, :]
        dy = tl.load(dy_ptr + at, mask=keep, other=0.0).to(ACC)
        dz = _slopes(dy, centred, scale, bias, gate_ptr, p, c, keep, H, W, g_sn, g_sh, g_sw, FLAT, HAS_GATE, ACT, ACC)
        if HAS_DZ:
            at = pixel_offsets(p, H, W, dz_sn, dz_sh, dz_sw, FLAT)[:, None] + c[None, :]
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=keep)
        dx = scale * (dz - mean_dz - centred * rstd * mean_dz_xhat)
        at = pixel_offsets(p, H, W, dx_sn, dx_sh, dx_sw, FLAT)[:, None] + c[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)


def _config(x: Tensor, op: str, act: str = "none") -> tuple[int, Stream, tuple[int, int]]:
    """Pixels, tiles, and the grid: shares of pixels x blocks of channels."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {act!r}; use one of {', '.join(ACTIVATIONS)}")
    pixels = count_pixels(x, op)
    config = stream_config(pixels, x.shape[1], MOST_BLOCK_CHANNELS)
    return pixels, config, (config.programs(pixels), -(-x.shape[1] // config.block_c))


def _strides(like: Tensor, *maps: Tensor | None) -> list[int]:
    return [stride for x in maps for stride in spatial_strides(like if x is None else x)]


# -- statistics ---------------------------------------------------------------------------------------------------


def launch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 of an (N, C, H, W) window; see `moments`."""
    channels, dtype = x.shape[1], sum_dtype(x.dtype)
    if not x.numel():
        return x.new_zeros(channels, dtype=dtype), x.new_zeros(channels, dtype=dtype)
    pixels, config, grid = _config(x, "moments")
    parts = torch.empty(2, grid[0], channels, dtype=dtype, device=x.device)
    _moments_kernel[grid](
        x, parts[0], parts[1], *spatial_strides(x), pixels, x.shape[2], x.shape[3], channels, config.steps,
        BM=config.block_m, BC=config.block_c, FLAT=is_flat(x), ACC=accumulator(x.dtype), num_warps=config.num_warps,
    )  # fmt: skip
    mean, m2 = torch.empty_like(parts[0, 0]), torch.empty_like(parts[0, 0])
    block = power_of_two(channels, 4, 16384 if interpreting() else 16)  # narrow: more programs for little work
    _merge_kernel[(triton.cdiv(channels, block),)](
        parts[0], parts[1], mean, m2, grid[0], config.share, pixels, channels, BM=power_of_two(grid[0], 1, 128),
        BC=block, ACC=accumulator(x.dtype),
    )  # fmt: skip
    return mean, m2


@torch.library.custom_op("gigamorph::moments", mutates_args=())
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel of a window, (C,) in float32 (float64 for float64).

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
    """
    return launch_moments(nhwc(x))


@moments.register_fake
def _(x):
    mean, m2 = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return mean, m2


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two windows together, by Chan's formula."""
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = a, b
    count = count_a + count_b
    if count_a == 0 or count_b == 0:
        return a if count_b == 0 else b
    delta = mean_b - mean_a
    return count, mean_a + delta * (count_b / count), m2_a + m2_b + delta.square() * (count_a * (count_b / count))


def moments_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations in plain PyTorch."""
    mean = x.mean((0, 2, 3))
    return mean, (x - mean.reshape(-1, 1, 1)).square().sum((0, 2, 3))


# -- forward ------------------------------------------------------------------------------------------------------


def launch_normalize_act(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    act: str, y: Tensor,
) -> None:  # fmt: skip
    """Write y = act((x - mean) * rstd * weight + bias + residual).

    Args:
        x, residual, y: (N, C, H, W) windows; y may be x or the residual.
        mean, rstd, weight, bias: (C,), of any floating dtype.
    """
    if not x.numel():
        return
    pixels, config, grid = _config(x, "normalize_act", act)
    _normalize_act_kernel[grid](
        x, mean, rstd, weight, bias, residual, y, *_strides(x, x, residual, y), pixels, x.shape[2], x.shape[3],
        x.shape[1], config.steps, BM=config.block_m, BC=config.block_c, FLAT=is_flat(x, residual, y),
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACT=act,
        ACC=accumulator(x.dtype), num_warps=config.num_warps,
    )  # fmt: skip


@torch.library.custom_op("gigamorph::normalize_act", mutates_args=())
def normalize_act(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    act: str,
) -> Tensor:  # fmt: skip
    """act((x - mean) * rstd * weight + bias + residual) in channels-last memory; see `launch_normalize_act`."""
    x, residual = nhwc(x), None if residual is None else nhwc(residual)
    y = empty_map(*x.shape, x)
    launch_normalize_act(x, mean, rstd, weight, bias, residual, act, y)
    return y


@normalize_act.register_fake
def _(x, mean, rstd, weight, bias, residual, act):
    return empty_map(*x.shape, x)


def normalize_act_reference(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and z in plain PyTorch."""
    z = (x - mean.reshape(-1, 1, 1)) * rstd.reshape(-1, 1, 1)
    if weight is not None:
        z = z * weight.reshape(-1, 1, 1)
    if bias is not None:
        z = z + bias.reshape(-1, 1, 1)
    if residual is not None:
        z = z + residual
    return activate_reference(z, act), z


# -- backward -----------------------------------------------------------------------------------------------------


def launch_gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of dz and of dz * xhat over (N, C, H, W) windows; see `gradient_sums`."""
    channels = x.shape[1]
    if not x.numel():
        return x.new_zeros(channels, dtype=sum_dtype(x.dtype)), x.new_zeros(channels, dtype=sum_dtype(x.dtype))
    pixels, config, grid = _config(x, "gradient_sums", act)
    sums = torch.empty(grid[0], 2, channels, dtype=sum_dtype(x.dtype), device=x.device)
    _gradient_sums_kernel[grid](
        dy, x, mean, rstd, weight, bias, gate, sums, *_strides(x, dy, x, gate), pixels, x.shape[2], x.shape[3],
        channels, config.steps, BM=config.block_m, BC=config.block_c, FLAT=is_flat(dy, x, gate),
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_GATE=gate is not None, ACT=act,
        ACC=accumulator(x.dtype), num_warps=config.num_warps,
    )  # fmt: skip
    return sums[:, 0].sum(0), sums[:, 1].sum(0)


@torch.library.custom_op("gigamorph::gradient_sums", mutates_args=())
def gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums over a window of dz and of dz * xhat: dbias and dweight, (C,) in float32 (float64 for float64).

    Args:
        dy, x: (N, C, H, W), the gradient of y and the raw map.
        gate: what gives act's slope, of x's size: z, or y for ReLU and ReLU6. None: z is computed from x, which is
            right where no residual was added.
    """
    return launch_gradient_sums(nhwc(dy), nhwc(x), mean, rstd, weight, bias, None if gate is None else nhwc(gate), act)


@gradient_sums.register_fake
def _(dy, x, mean, rstd, weight, bias, gate, act):
    dbias, dweight = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return dbias, dweight


def launch_normalize_act_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    act: str, mean_dz: Tensor, mean_dz_xhat: Tensor, dx: Tensor, dz: Tensor | None,
) -> None:  # fmt: skip
    """Write dx = weight * rstd * (dz - mean_dz - xhat * mean_dz_xhat), and dz if given (the residual's gradient).

    Args:
        dy, x, gate: as in `gradient_sums`.
        mean_dz, mean_dz_xhat: (C,), the sums of `gradient_sums` over the whole map, divided by its pixels.
        dx, dz: windows of x's size; dx or dz may be dy.
    """
    if not x.numel():
        return
    pixels, config, grid = _config(x, "normalize_act_backward", act)
    _normalize_act_backward_kernel[grid](
        dy, x, mean, rstd, weight, bias, gate, mean_dz, mean_dz_xhat, dx, dz, *_strides(x, dy, x, gate, dx, dz),
        pixels, x.shape[2], x.shape[3], x.shape[1], config.steps, BM=config.block_m, BC=config.block_c,
        FLAT=is_flat(dy, x, gate, dx, dz), HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None, HAS_DZ=dz is not None, ACT=act, ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
    )  # fmt: skip


@torch.library.custom_op("gigamorph::normalize_act_backward", mutates_args=())
def normalize_act_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    act: str, mean_dz: Tensor, mean_dz_xhat: Tensor, keep_dz: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx, and dz (empty unless `keep_dz`); see `launch_normalize_act_backward`."""
    dy, x, gate = nhwc(dy), nhwc(x), None if gate is None else nhwc(gate)
    dx, dz = _gradients(x, keep_dz)
    launch_normalize_act_backward(
        dy, x, mean, rstd, weight, bias, gate, act, mean_dz, mean_dz_xhat, dx, dz if keep_dz else None
    )
    return dx, dz


def _gradients(x: Tensor, keep_dz: bool) -> tuple[Tensor, Tensor]:
    return empty_map(*x.shape, x), empty_map(*x.shape, x) if keep_dz else x.new_empty(0)


@normalize_act_backward.register_fake
def _(dy, x, mean, rstd, weight, bias, gate, act, mean_dz, mean_dz_xhat, keep_dz):
    return _gradients(x, keep_dz)


def normalize_act_backward_reference(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    act: str, mean_dz: Tensor, mean_dz_xhat: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dz and the window's sums of dz and of dz * xhat, in plain PyTorch."""
    z = normalize_act_reference(x, mean, rstd, weight, bias, None, "none")[0] if gate is None else gate
    dz = dy * slope_reference(z, act)
    xhat = normalize_act_reference(x, mean, rstd, None, None, None, "none")[0]
    dx = (dz - mean_dz.reshape(-1, 1, 1) - xhat * mean_dz_xhat.reshape(-1, 1, 1)) * rstd.reshape(-1, 1, 1)
    if weight is not None:
        dx = dx * weight.reshape(-1, 1, 1)
    return dx, dz, dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))
