"""Moments of each channel of a map, the statistics of a BatchNorm in training, computed in parts, and their gradient:

    moments            mean = sum x / n,   m2 = sum (x - mean)^2
    moments_backward   dx = dmean / n + 2 (x - mean) dvar / n + addend,   var = m2 / n

Variances are never computed as E[x^2] - E[x]^2, which cancels. A program updates mean and m2 of each row of its tiles
by Welford's recurrence, and parts merge by Chan's formula in a fixed order: two runs agree bit by bit.

    delta = mean_b - mean_a,   mean = mean_a + delta * n_b/n,   m2 = m2_a + m2_b + delta^2 * n_a*n_b/n

Parts are the moments of the programs' shares of a map, or those of the values that the tiles of another kernel write
(`tile_moments`, `merge_parts`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choice import run_fastest
from .dtypes import accumulator, sum_dtype
from .stream import SHARE, Share, Stream, channel, load, step_pixels, store, whole
from .tiles import MOST_BLOCK_CHANNELS, merge_blocks, merge_chunk
from .triton_private import jit_kernel
from .windows import map_like, nhwc


@triton.jit
def _merge_rows(count, mean, m2):
    """The moments of all rows together: counts [BM], mean and m2 [BM, BC] to [BC]."""
    total = tl.sum(count, 0)
    overall = tl.sum(count[:, None] * mean, 0) / total
    # A second sum around the first result: sums of numbers far from zero lose digits that the deviations need.
    overall += tl.sum(count[:, None] * (mean - overall[None, :]), 0) / total
    away = mean - overall[None, :]
    return overall, tl.sum(m2 + count[:, None] * away * away, 0)


@jit_kernel(SHARE)
def _moments_kernel(
    x,  # map [N, C, H, W]
    mean_ptr,  # [programs, C], C folded
    m2_ptr,  # [programs, C]
    pixels,
    H,
    W,
    C,
    period,
    steps,
    TILE: tl.constexpr,
):
    """Mean and m2 of a program's share of the pixels."""
    C = whole(C, TILE.VEC)
    share = Share(pixels, H, W, C, period, steps)
    c = tl.program_id(1) * TILE.BC + tl.arange(0, TILE.BC)
    BM: tl.constexpr = TILE.BM
    BC: tl.constexpr = TILE.BC
    count = tl.zeros((BM,), TILE.ACC)
    mean = tl.zeros((BM, BC), TILE.ACC)
    m2 = tl.zeros((BM, BC), TILE.ACC)
    for step in range(share.steps):
        p = step_pixels(share, step, TILE)
        inside = p < share.pixels
        values = load(x, p, c, inside[:, None] & (c < C)[None, :], share, TILE)
        count += tl.where(inside, 1.0, 0.0).to(TILE.ACC)
        # All rows have the same count until the map ends; beyond, they do not change.
        weight = tl.where(inside, 1.0 / tl.maximum(count, 1.0), 0.0)[:, None]
        before = values - mean
        mean += before * weight
        m2 += tl.where(inside[:, None], before * (values - mean), 0.0)
    mean, m2 = _merge_rows(count, mean, m2)
    at = tl.program_id(0).to(tl.int64) * C + c
    tl.store(mean_ptr + at, mean, mask=c < C)
    tl.store(m2_ptr + at, m2, mask=c < C)


@jit_kernel(["parts", "chunk", "down", "across", "rows", "cols", "lines", "run"])
def _merge_kernel(
    part_mean_ptr,  # [parts, C]
    part_m2_ptr,  # [parts, C]
    part_count_ptr,  # [parts], or None if parts are boxes of an image
    mean_ptr,  # [programs, C]
    m2_ptr,  # [programs, C]
    count_ptr,  # [programs], or None if one program merges all parts
    parts,
    chunk,  # parts of a program, a multiple of BM or all
    down,
    across,  # parts of an image in vertical and horizontal direction
    rows,
    cols,  # size of a part; parts at the end have the remainder
    lines,
    run,  # rows and columns of an image
    C,
    BM: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean and m2 of a chunk of consecutive parts; a program merges BC channels, BM parts at a time."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, parts)
    count = tl.zeros((BM,), ACC)
    mean = tl.zeros((BM, BC), ACC)
    m2 = tl.zeros((BM, BC), ACC)
    for first in range(begin, end, BM):
        part = first + tl.arange(0, BM)
        inside = part < end
        if part_count_ptr is None:
            high = tl.minimum(rows, lines - part // across % down * rows)
            n = tl.where(inside, high * tl.minimum(cols, run - part % across * cols), 0).to(ACC)
        else:
            n = tl.load(part_count_ptr + part, mask=inside, other=0.0)
        at = part.to(tl.int64)[:, None] * C + c[None, :]
        keep = inside[:, None] & (c < C)[None, :]
        delta = tl.load(part_mean_ptr + at, mask=keep, other=0.0) - mean
        weight = n / tl.maximum(count + n, 1.0)
        mean += delta * weight[:, None]
        m2 += tl.load(part_m2_ptr + at, mask=keep, other=0.0) + delta * delta * (count * weight)[:, None]
        count += n
    if count_ptr is not None:
        tl.store(count_ptr + tl.program_id(0), tl.sum(count, 0), mask=tl.program_id(1) == 0)
    mean, m2 = _merge_rows(count, mean, m2)
    at = tl.program_id(0).to(tl.int64) * C + c
    tl.store(mean_ptr + at, mean, mask=c < C)
    tl.store(m2_ptr + at, m2, mask=c < C)


@triton.jit
def tile_moments(y, inside, count, ACC: tl.constexpr):
    """Mean and m2 over the rows of a tile that are inside: y [BM, BN], inside [BM], count of those."""
    mean = tl.sum(tl.where(inside[:, None], y, 0.0), 0) / count.to(ACC)
    away = tl.where(inside[:, None], y - mean[None, :], 0.0)
    return mean, tl.sum(away * away, 0)


@jit_kernel(["count", *SHARE])
def _moments_backward_kernel(
    x,  # map [N, C, H, W]
    addend,  # map [N, C, H, W] or None
    dx,  # map [N, C, H, W]
    mean_ptr,  # [C]
    dmean_ptr,  # [C] or None
    dvar_ptr,  # [C]
    count,
    pixels,
    H,
    W,
    C,
    period,
    steps,
    TILE: tl.constexpr,
):
    """dx = dmean / count + 2 (x - mean) dvar / count + addend of a program's share of the pixels."""
    C = whole(C, TILE.VEC)
    share = Share(pixels, H, W, C, period, steps)
    c = tl.program_id(1) * TILE.BC + tl.arange(0, TILE.BC)
    at = c % share.period
    mean = channel(mean_ptr, at, C, TILE.ACC)
    slope_x = 2 * channel(dvar_ptr, at, C, TILE.ACC) / count.to(TILE.ACC)
    if dmean_ptr is not None:
        shift = channel(dmean_ptr, at, C, TILE.ACC) / count.to(TILE.ACC)
    else:
        BC: tl.constexpr = TILE.BC
        shift = tl.zeros((1, BC), TILE.ACC)
    for step in range(share.steps):
        p = step_pixels(share, step, TILE)
        keep = (p < share.pixels)[:, None] & (c < C)[None, :]
        values = (load(x, p, c, keep, share, TILE) - mean) * slope_x + shift
        if addend.ptr is not None:
            values += load(addend, p, c, keep, share, TILE)
        store(dx, p, c, keep, values, share, TILE)


def launch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 of an (N, C, H, W) window; see `moments`."""
    if not x.numel():
        return x.new_zeros(x.shape[1], dtype=sum_dtype(x.dtype)), x.new_zeros(x.shape[1], dtype=sum_dtype(x.dtype))
    s = Stream("moments", MOST_BLOCK_CHANNELS, x, fold=True)
    parts = torch.empty(2, s.grid[0] * s.folds, x.shape[1], dtype=sum_dtype(x.dtype), device=x.device)
    s.launch(_moments_kernel, *parts)
    # Rows of folded pixels: a part is a column of them, as high as a program's share.
    return merge_parts(parts, (s.length, 1), (s.share.pixels, s.folds))


def merge_parts(parts: Tensor, box: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean and m2 of all parts of a map together, merged in a fixed order.

    Args:
        parts: (2, parts, C), means and m2 of parts in row-major order, image after image.
        box: rows and columns of a part; parts at the end of an image have the remainder.
        size: rows and columns of an image.
    """
    (mean, m2), counts, channels = parts, None, parts.shape[2]
    like = {"dtype": parts.dtype, "device": parts.device}
    boxes = triton.cdiv(size[0], box[0]), triton.cdiv(size[1], box[1]), *box, *size
    while True:  # merges chunks, then the results, until one remains
        given, count = (mean, m2, counts), mean.shape[0]
        rows, block = merge_blocks(count, channels)
        chunk = merge_chunk(count, rows)
        programs = triton.cdiv(count, chunk)
        mean, m2 = (torch.empty(programs, channels, **like) for _ in range(2))
        counts = torch.empty(programs, **like) if programs > 1 else None
        made, acc = (mean, m2, counts), accumulator(parts.dtype)
        _merge_kernel[programs, triton.cdiv(channels, block)](
            *given, *made, count, chunk, *boxes, channels, BM=rows, BC=block, ACC=acc
        )
        if counts is None:
            return mean[0], m2[0]


@torch.library.custom_op("gigamorph::moments", mutates_args=())
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel of a window, (C,) in float32 (float64 for float64).

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16.
    """
    x = nhwc(x)

    if not x.numel():
        return launch_moments(x)
    return run_fastest("moments", x, (), lambda: launch_moments(x), lambda: moments_reference(x.to(sum_dtype(x.dtype))))


@moments.register_fake
def _(x):
    mean, m2 = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return mean, m2


def moments_of_each(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 of each image of a batch: (N, C)."""
    means, m2s = zip(*(moments(image) for image in x.split(1)), strict=True)
    return torch.stack(means), torch.stack(m2s)


def moments_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations in plain PyTorch."""
    mean = x.mean((0, 2, 3))
    return mean, (x - mean.reshape(-1, 1, 1)).square_().sum((0, 2, 3))


def launch_moments_backward(
    x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor, count: int, addend: Tensor | None, dx: Tensor
) -> None:
    """Write dx = addend + dmean / count + 2 (x - mean) dvar / count; see `moments_backward`."""
    if x.numel():
        s = Stream("moments_backward", MOST_BLOCK_CHANNELS, x, addend, dx, fold=True)
        s.launch(_moments_backward_kernel, mean, dmean, dvar, count)


@torch.library.custom_op("gigamorph::moments_backward", mutates_args=())
def moments_backward(
    x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor, count: int, addend: Tensor | None
) -> Tensor:
    """The gradient of a window through the mean and (biased) variance of the whole map, plus `addend`.

    Args:
        x, addend: (N, C, H, W).
        mean, dmean, dvar: (C,), of the whole map.
        count: pixels of the whole map.
    """
    x, addend = nhwc(x), None if addend is None else nhwc(addend)

    def ours() -> Tensor:
        dx = map_like(x)
        launch_moments_backward(x, mean, dmean, dvar, count, addend, dx)
        return dx

    def stock() -> Tensor:
        return nhwc(moments_backward_reference(x, mean, dmean, dvar, count, addend).to(x.dtype))

    return run_fastest("moments_backward", x, (dmean is None, addend is None), ours, stock)


@moments_backward.register_fake
def _(x, mean, dmean, dvar, count, addend):
    return map_like(x)


def moments_backward_reference(
    x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor, count: int, addend: Tensor | None
) -> Tensor:
    """`moments_backward` in plain PyTorch, in the dtype of the gradients."""
    dx = torch.sub(x, mean.to(dvar.dtype).reshape(-1, 1, 1)).mul_(2 * dvar.reshape(-1, 1, 1) / count)
    if dmean is not None:
        dx.add_(dmean.reshape(-1, 1, 1) / count)
    return dx if addend is None else dx.add_(addend)
