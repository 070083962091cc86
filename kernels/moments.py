"""Moments of each channel of a map, the statistics of a BatchNorm in training, in parts and with their gradient:

    moments            mean = sum x / n,   m2 = sum (x - mean)^2
    moments_backward   dx = dmean / n + 2 (x - mean) dvar / n + addend,   var = m2 / n

Variances never come as E[x^2] - E[x]^2, which cancels. A program follows mean and m2 of each row of its tiles by
Welford's recurrence, and parts merge by Chan's formula, always in the same order: two runs agree bit by bit.

    delta = mean_b - mean_a,   mean = mean_a + delta * n_b/n,   m2 = m2_a + m2_b + delta^2 * n_a*n_b/n

Parts may be windows of a map (`merge_moments`), or what the tiles of another kernel give of the values that they write
(`tile_moments`, `merge_parts`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choice import run_fastest
from .dtypes import accumulator, sum_dtype
from .layer_norm import Stream, count_pixels, is_flat, pixel_offsets, stream_config
from .tuning import interpreting, power_of_two
from .windows import empty_map, nhwc, spatial_strides

MOST_BLOCK_CHANNELS = 128  # 256 bytes of 16-bit channels lie side by side: whole cache lines

Moments = tuple[int, Tensor, Tensor]  # values per channel, their mean, the sum of their squared deviations from it


@triton.jit
def channel(ptr, c, C, ACC: tl.constexpr):
    """One number per channel, [1, BC]."""
    return tl.load(ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]


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
    x_ptr,
    mean_ptr,
    m2_ptr,  # parts: [programs, C]
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,  # strides of image, row, pixel; channels have stride 1
    pixels,
    H,
    W,
    C,
    steps,  # steps: tiles of BM pixels per program
    BM: tl.constexpr,
    BC: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
):
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
    part_mean_ptr,
    part_m2_ptr,
    mean_ptr,
    m2_ptr,  # [parts, C], [parts, C], [C], [C]
    parts,
    segments,
    share,
    run,
    C,  # of every row of `run` pixels all parts but the last are of `share` pixels
    BM: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    count = tl.zeros((BM,), ACC)
    mean = tl.zeros((BM, BC), ACC)
    m2 = tl.zeros((BM, BC), ACC)
    for first in range(0, parts, BM):
        part = first + tl.arange(0, BM)
        n = tl.where(part < parts, tl.minimum(share, run - part % segments * share), 0).to(ACC)
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
def tile_moments(y, inside, count, ACC: tl.constexpr):
    """Mean and m2 over the rows of a tile that are inside: y [BM, BN], inside [BM], count of those."""
    mean = tl.sum(tl.where(inside[:, None], y, 0.0), 0) / count.to(ACC)
    away = tl.where(inside[:, None], y - mean[None, :], 0.0)
    return mean, tl.sum(away * away, 0)


@triton.jit(do_not_specialize=["count"])
def _moments_backward_kernel(
    x_ptr,
    mean_ptr,
    dmean_ptr,
    dvar_ptr,
    addend_ptr,
    dx_ptr,
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,
    a_sn: tl.int64,
    a_sh: tl.int64,
    a_sw: tl.int64,
    dx_sn: tl.int64,
    dx_sh: tl.int64,
    dx_sw: tl.int64,
    count,
    pixels,
    H,
    W,
    C,
    steps,
    BM: tl.constexpr,
    BC: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_DMEAN: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean = channel(mean_ptr, c, C, ACC)
    slope_x = 2 * channel(dvar_ptr, c, C, ACC) / count.to(ACC)
    shift = channel(dmean_ptr, c, C, ACC) / count.to(ACC) if HAS_DMEAN else tl.zeros((1, BC), ACC)
    first = tl.program_id(0) * steps * BM
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)
        keep = (p < pixels)[:, None] & (c < C)[None, :]
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c[None, :]
        dx = (tl.load(x_ptr + at, mask=keep, other=0.0).to(ACC) - mean) * slope_x + shift
        if HAS_ADDEND:
            at = pixel_offsets(p, H, W, a_sn, a_sh, a_sw, FLAT)[:, None] + c[None, :]
            dx += tl.load(addend_ptr + at, mask=keep, other=0.0).to(ACC)
        at = pixel_offsets(p, H, W, dx_sn, dx_sh, dx_sw, FLAT)[:, None] + c[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)


def share_out(x: Tensor, op: str) -> tuple[int, Stream, tuple[int, int]]:
    """Pixels, tiles, and the grid: shares of pixels x blocks of channels."""
    pixels = count_pixels(x, op)
    config = stream_config(pixels, x.shape[1], MOST_BLOCK_CHANNELS)
    return pixels, config, (config.programs(pixels), -(-x.shape[1] // config.block_c))


def strides_of(like: Tensor, *maps: Tensor | None) -> list[int]:
    """Strides of image, row and pixel of all maps; of `like` for those that are not there."""
    return [stride for x in maps for stride in spatial_strides(like if x is None else x)]


def launch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 of an (N, C, H, W) window; see `moments`."""
    channels, dtype = x.shape[1], sum_dtype(x.dtype)
    if not x.numel():
        return x.new_zeros(channels, dtype=dtype), x.new_zeros(channels, dtype=dtype)
    pixels, config, grid = share_out(x, "moments")
    parts = torch.empty(2, grid[0], channels, dtype=dtype, device=x.device)
    _moments_kernel[grid](
        x,
        parts[0],
        parts[1],
        *spatial_strides(x),
        pixels,
        x.shape[2],
        x.shape[3],
        channels,
        config.steps,
        BM=config.block_m,
        BC=config.block_c,
        FLAT=is_flat(x),
        ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
    )
    return merge_parts(parts, config.share, pixels)


def merge_parts(parts: Tensor, share: int, run: int) -> tuple[Tensor, Tensor]:
    """Mean and m2 of all parts of a map together, always in the same order.

    Args:
        parts: (2, parts, C), means and m2 of parts that lie row after row.
        share: pixels of a part; the last one of a row has the rest.
        run: pixels of a row.
    """
    _, count, channels = parts.shape
    mean, m2 = torch.empty_like(parts[0, 0]), torch.empty_like(parts[0, 0])
    block = power_of_two(channels, 4, 16384 if interpreting() else 16)  # narrow: more programs for little work
    _merge_kernel[(triton.cdiv(channels, block),)](
        parts[0],
        parts[1],
        mean,
        m2,
        count,
        triton.cdiv(run, share),
        share,
        run,
        channels,
        BM=power_of_two(count, 1, 128),
        BC=block,
        ACC=accumulator(parts.dtype),
    )
    return mean, m2


@torch.library.custom_op("gigamorph::moments", mutates_args=())
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel of a window, (C,) in float32 (float64 for float64).

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
    """
    x = nhwc(x)

    def stock() -> tuple[Tensor, Tensor]:
        wide = x.to(sum_dtype(x.dtype))
        mean = wide.mean((0, 2, 3))
        return mean, (wide - mean.reshape(-1, 1, 1)).square_().sum((0, 2, 3))

    return run_fastest("moments", x, (), lambda: launch_moments(x), stock) if x.numel() else launch_moments(x)


@moments.register_fake
def _(x):
    mean, m2 = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return mean, m2


def moments_of_each(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 of each image of a batch: (N, C)."""
    means, m2s = zip(*(moments(image) for image in x.split(1)), strict=True)
    return torch.stack(means), torch.stack(m2s)


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


def launch_moments_backward(
    x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor, count: int, addend: Tensor | None, dx: Tensor
) -> None:
    """Write dx = addend + dmean / count + 2 (x - mean) dvar / count; see `moments_backward`."""
    if not x.numel():
        return
    pixels, config, grid = share_out(x, "moments_backward")
    _moments_backward_kernel[grid](
        x,
        mean,
        dmean,
        dvar,
        addend,
        dx,
        *strides_of(x, x, addend, dx),
        count,
        pixels,
        x.shape[2],
        x.shape[3],
        x.shape[1],
        config.steps,
        BM=config.block_m,
        BC=config.block_c,
        FLAT=is_flat(x, addend, dx),
        HAS_DMEAN=dmean is not None,
        HAS_ADDEND=addend is not None,
        ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
    )


@torch.library.custom_op("gigamorph::moments_backward", mutates_args=())
def moments_backward(
    x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor, count: int, addend: Tensor | None
) -> Tensor:
    """What a window of a map gets of the gradients of the map's mean and (biased) variance, plus `addend`.

    Args:
        x, addend: (N, C, H, W).
        mean, dmean, dvar: (C,), of the whole map.
        count: pixels of the whole map.
    """
    x, addend = nhwc(x), None if addend is None else nhwc(addend)

    def ours() -> Tensor:
        dx = empty_map(*x.shape, x)
        launch_moments_backward(x, mean, dmean, dvar, count, addend, dx)
        return dx

    def stock() -> Tensor:
        return nhwc(moments_backward_reference(x, mean, dmean, dvar, count, addend).to(x.dtype))

    return run_fastest("moments_backward", x, (dmean is None, addend is None), ours, stock)


@moments_backward.register_fake
def _(x, mean, dmean, dvar, count, addend):
    return empty_map(*x.shape, x)


def _setup_moments(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _differentiate_moments(ctx, dmean, dm2):
    x, mean = ctx.saved_tensors
    count = x.shape[0] * x.shape[2] * x.shape[3]
    return moments_backward(x, mean, dmean, dm2 * count, count, None)  # m2 = n var


moments.register_autograd(_differentiate_moments, setup_context=_setup_moments)


def moments_backward_reference(
    x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor, count: int, addend: Tensor | None
) -> Tensor:
    """The same in plain PyTorch, in the dtype of the gradients."""
    dx = torch.sub(x, mean.to(dvar.dtype).reshape(-1, 1, 1)).mul_(2 * dvar.reshape(-1, 1, 1) / count)
    if dmean is not None:
        dx.add_(dmean.reshape(-1, 1, 1) / count)
    return dx if addend is None else dx.add_(addend)
