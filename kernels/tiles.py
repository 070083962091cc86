"""Tiles of kernels that do not multiply matrices by descriptors: depthwise, streaming, pooling and the stem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from .triton_private import interpreting
from .tuning import capability, power_of_two, register_limit

# -- depthwise convolution ----------------------------------------------------------------------------------------

# Rows of output that a program computes at once: with more, registers allow too few programs on a multiprocessor.
DEPTHWISE_ROWS = 4
# Largest number of filter rows of a program, and of taps for the weight gradient: Triton's compile time grows faster
# than their number.
FILTER_ROWS, TAPS = 7, 28
# Sums that a thread of the weight gradient keeps in registers.
SUMS = 56


@dataclass(frozen=True)
class DepthwiseTile:
    """Rows, pixels of a row, and channels that a program processes at a time, and its warps."""

    rows: int
    pixels: int
    channels: int
    num_warps: int = 4


def depthwise_tile(dtype: torch.dtype, channels: int, rows: int, pixels: int, taps: int = 0) -> DepthwiseTile:
    """The tile of a map of `rows` rows of `pixels` pixels, of one phase in the data gradient.

    A thread has 16 bytes of channels, or in the weight gradient as many as its sums for `taps` taps allow.
    """
    vector = 16 // dtype.itemsize
    while vector > 1 and vector * taps > SUMS:
        vector //= 2
    rows = power_of_two(rows, 1, DEPTHWISE_ROWS)
    if interpreting():  # few large programs: a call costs more than its elements
        return DepthwiseTile(rows, power_of_two(pixels, 1, 256), power_of_two(channels, 1, 128))
    # A line of 128 bytes, or half of one if that leaves fewer lanes idle.
    line = 128 // dtype.itemsize
    whole, half = (triton.cdiv(channels, n) * n for n in (line, line // 2))
    block = power_of_two(channels, vector, line if whole <= half else line // 2)
    run = power_of_two(pixels, max(1, 32 * vector // block), 128 * vector // block)
    return DepthwiseTile(rows, run, block, run * block // (32 * vector))


def depthwise_wgrad_splits(programs: int, tiles: int) -> int:
    """Splits of the pixels: enough programs for several on each multiprocessor of the largest chip."""
    return min(triton.cdiv(2 if interpreting() else 1024, programs), tiles)


def equal_part(size: int, most: int) -> int:
    """The length of equal parts, as few as possible, of at most `most`."""
    return triton.cdiv(size, triton.cdiv(size, most))


# -- kernels that stream through a map ----------------------------------------------------------------------------

MOST_BLOCK_CHANNELS = 128  # 256 adjacent bytes of 16-bit channels: whole cache lines
MOST_NORM_CHANNELS = 8192  # one program of a layer norm holds them all in registers


@dataclass(frozen=True)
class StreamConfig:
    """Distribution of a map's pixels: each program processes `steps` tiles of block_m pixels x block_c channels."""

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


def _padded(channels: int, block: int) -> int:
    return -(-channels // block) * block


def stream_config(pixels: int, channels: int, most_channels: int) -> StreamConfig:
    """The tile of a kernel that streams through a map.

    A thread has 16 elements: with two of them for sums, enough blocks fit to hide the memory's latency. There are about
    2000 programs with at most 1024 tiles each, so that a sum has few terms before it is added to others. For a small
    map there are fewer programs, with four tiles each, so that few partial sums remain. The memory is busy if 3 MB are
    in flight (3 TB/s for 1 us of latency); a program requests 4 KB of each 16-bit map at once, 512 programs 2 MB.

    If channels need several blocks, narrower ones leave fewer lanes idle: for 144 channels 112 of 256 in blocks of 128,
    16 of 160 in blocks of 32, which are 64 bytes of 16-bit channels, two memory sectors.
    """
    block_c = power_of_two(channels, 4, most_channels)
    if channels > most_channels:
        for narrower in most_channels // 2, most_channels // 4:
            if 8 * _padded(channels, narrower) <= 7 * _padded(channels, block_c):
                block_c = narrower
    num_warps = min(16, max(4, block_c // 512))
    block_m = max(1, num_warps * 512 // block_c)
    if interpreting():  # few large programs: a call costs more than its elements
        block_m = max(1, 16384 // block_c)
    tiles = -(-pixels // block_m) * -(-channels // block_c)
    programs = 2 if interpreting() else min(2048, max(512, tiles // 4))
    return StreamConfig(block_m, block_c, min(1024, -(-tiles // programs)), num_warps)


def merge_blocks(parts: int, channels: int) -> tuple[int, int]:
    """Parts and channels that a program merges or adds at a time.

    Eight channels are 32 bytes, the smallest memory transaction, which gives the most programs; 16 elements per thread.
    """
    block = power_of_two(channels, 1, 16384 if interpreting() else 8)
    return power_of_two(parts, 1, 128 if interpreting() else 2048 // block), block


def merge_chunk(parts: int, rows: int) -> int:
    """Consecutive parts that a program merges, `rows` at a time: all if four steps suffice, else those of two steps.

    A step waits for the memory, about 1 us; another launch, which merges the chunks, costs 3 us.
    """
    return parts if parts <= 4 * rows else 2 * rows


def pool_tile(rows: int, cols: int, channels: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, columns and channels of a tile: two vectors of 16 bytes for each of 128 threads; four rows if they fit."""
    room = 1 << 16 if interpreting() else 128 * 2 * 16 // itemsize
    block_c = power_of_two(min(channels, 128), 1, room)
    pixels = room // block_c
    block_h = power_of_two(rows, 1, min(pixels, max(4, pixels // power_of_two(cols, 1, pixels))))
    return block_h, power_of_two(cols, 1, pixels // block_h), block_c


# -- stem ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StemTile:
    """Pixels, filters and taps of a tile, and its launch options."""

    pixels: int
    filters: int
    taps: int
    options: Mapping[str, int | None] = field(default_factory=dict)


def stem_tile(weight: Tensor, width: int) -> StemTile:
    """The forward's tile, the largest with maxima, spots and sums in registers, for rows of y of this width."""
    side = 64 if weight.dtype.itemsize <= 2 else 32
    roomy = weight.shape[1] > 1
    # With 32 of a mammogram's 49 taps at a time, some registers would spill on sm_90 and sm_100.
    return _stem_tile(weight, width, side, side, 32 if roomy or side == 32 else 16, roomy)


def stem_backward_tile(weight: Tensor, width: int) -> StemTile:
    """The backward's tile; its pixels are outputs of the convolution, `width` in a line."""
    return _stem_tile(weight, width, 32, 64, 64, roomy=False)


def _stem_tile(weight: Tensor, width: int, pixels: int, filters: int, taps: int, roomy: bool) -> StemTile:
    k, depth = weight.shape[0], weight[0].numel()
    if interpreting():  # few large programs: a call costs more than its elements
        return StemTile(power_of_two(width, 16, 128), power_of_two(k, 16, 128), power_of_two(depth, 16, 64))
    # One stage: with more, Triton (3.6, 3.7) may overwrite patches in registers while Hopper still multiplies them
    # (triton-lang/triton#9433).
    chip = capability(weight.device)
    # Two programs per multiprocessor, so that one gathers pixels while the other multiplies. With the limit of 128,
    # some registers would spill in these cases (Triton 3.6 or 3.7).
    limit = 255 if roomy or chip < 90 or weight.dtype.itemsize > 2 else 128
    # 256 threads: AMD's warps have 64.
    options = {"num_warps": 8 if chip else 4, "num_stages": 1, **register_limit(weight.device, limit)}
    return StemTile(pixels, power_of_two(k, 16, filters), power_of_two(depth, 16, taps), options)


def stem_lines(rows: int, tiles: int) -> int:
    """Rows of y that a program computes: long strips share more conv lines, short ones occupy every multiprocessor.

    Args:
        rows: rows of y.
        tiles: tiles of all rows together.
    """
    return min(rows, 64) if interpreting() else max(1, min(8, tiles // 2048))


def stem_share(tiles: int) -> int:
    """Tiles that one program of the backward sums: at most about 20 MB of partial sums."""
    return triton.cdiv(tiles, 4 if interpreting() else 1024)
