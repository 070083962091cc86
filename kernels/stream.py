"""Addresses of maps in kernels, and the distribution of pixels over the programs of a streaming kernel.

A kernel receives a map as a `Map`: the address of its first element and the strides of images, rows and pixels; its
channels are adjacent. A missing map or vector has the address None, which the compiler sees.

A streaming kernel numbers the pixels of all images p = (n*H + i)*W + j. Each program processes `steps` tiles of BM
pixels and BC channels in sequence. Programs along the first axis of the grid share the pixels, along the second the
channels.

Blocks of BC channels, a power of two, leave lanes idle if they do not divide the channels: 112 of 256 for 144 channels.
A kernel that treats each channel separately may therefore fold pixels of dense maps into the channels: P pixels of C
channels have the memory layout of P/k pixels of k*C channels, of which the c-th is channel c % C of the map.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import accumulator, sum_dtype
from .tiles import stream_config
from .windows import is_dense


class Map(NamedTuple):
    """An (N, C, H, W) window with channels of stride 1: address, strides of image, row and pixel in elements."""

    ptr: Tensor | None
    sn: int
    sh: int
    sw: int


class Share(NamedTuple):
    """Sizes for all programs of a streaming kernel: pixels of all images, rows, columns, channels; tiles per program.

    C counts folded channels; folded channel c uses element c % period of a vector with an element per channel.
    """

    pixels: int
    H: int
    W: int
    C: int
    period: int
    steps: int


# Passed to kernels one by one: integers in a tuple are specialised on 1 and on multiples of 16 even if
# `do_not_specialize` names them, and most sizes of maps would need another compilation.
SHARE = list(Share._fields)


class TileShape(NamedTuple):
    """Compile-time constants: pixels, channels of a tile; whether pixels are equally spaced; channels of a vector."""

    BM: int
    BC: int
    FLAT: bool
    VEC: int
    ACC: tl.dtype


@triton.jit
def whole(n, VEC: tl.constexpr):
    """`n`, a multiple of VEC, in a form from which the compiler infers that, to move VEC channels at once."""
    return n if VEC == 1 else n // VEC * VEC


@triton.jit
def map_offsets(m, n, i, j, VEC: tl.constexpr):
    """Offsets of pixels (i, j) of images n, 64 bits wide; the arguments broadcast."""
    return n * whole(m.sn, VEC) + i * whole(m.sh, VEC) + j * whole(m.sw, VEC)


@triton.jit
def pixel_offsets(m, p, H, W, FLAT: tl.constexpr, VEC: tl.constexpr):
    """Offsets [BM] of pixels p = (n*H + i)*W + j; FLAT if they are equally spaced."""
    if FLAT:
        offsets = p.to(tl.int64) * whole(m.sw, VEC)
    else:
        # Division in 32 bits, which is cheap, but multiplication in 64.
        offsets = map_offsets(m, (p // (H * W)).to(tl.int64), (p // W % H).to(tl.int64), (p % W).to(tl.int64), VEC)
    return offsets


@triton.jit
def step_pixels(share, step, TILE: tl.constexpr):
    """Pixels [BM] of one step of this program."""
    return (tl.program_id(0) * share.steps + step) * TILE.BM + tl.arange(0, TILE.BM)


@triton.jit
def load(m, p, c, keep, share, TILE: tl.constexpr):
    """Channels c [BC] of pixels p [BM] of a map as [BM, BC] in ACC; zero where `keep` is false."""
    at = pixel_offsets(m, p, share.H, share.W, TILE.FLAT, TILE.VEC)[:, None] + c[None, :]
    return tl.load(m.ptr + at, mask=keep, other=0.0).to(TILE.ACC)


@triton.jit
def store(m, p, c, keep, values, share, TILE: tl.constexpr):
    """Write [BM, BC] values, rounded once."""
    at = pixel_offsets(m, p, share.H, share.W, TILE.FLAT, TILE.VEC)[:, None] + c[None, :]
    tl.store(m.ptr + at, values.to(m.ptr.dtype.element_ty), mask=keep)


@triton.jit
def channel(ptr, c, C, ACC: tl.constexpr):
    """One number per channel, [1, BC]."""
    return tl.load(ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]


def dense(vector: Tensor | None) -> Tensor | None:
    """A vector as a contiguous tensor for kernels: columns of matrices and expanded tensors are copied."""
    return None if vector is None else vector.contiguous()


def as_map(x: Tensor | None) -> Map:
    """The `Map` of a tensor. Unused strides are 0, so that one compiled kernel serves all of them."""
    if x is None:
        return Map(None, 0, 0, 0)
    return Map(x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(2) if x.shape[2] > 1 else 0, x.stride(3))


def vector(*maps: Tensor | None) -> int:
    """Channels per vector of up to 16 bytes of the first map that strides and channels of all maps allow."""
    first, *others = (x for x in maps if x is not None)
    strides = [stride for x in (first, *others) for stride in as_map(x)[1:]]
    return math.gcd(first.shape[1], *(x.shape[1] for x in others), *strides, 16 // first.element_size())


def is_flat(*maps: Tensor | None) -> bool:
    """Whether in each map the pixels of all images are equally spaced."""
    return all(
        (x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3))
        and (x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.shape[3] * x.stride(3))
        for x in maps
        if x is not None
    )


def folds(pixels: int, most_channels: int, *maps: Tensor | None) -> int:
    """Pixels to fold into one to fill blocks of `most_channels`, a power of two; 1 unless all maps are dense."""
    if not all(map(is_dense, maps)):
        return 1
    channels = next(x for x in maps if x is not None).shape[1]
    return math.gcd(pixels, most_channels // math.gcd(channels, most_channels))


def count_pixels(x: Tensor, op: str) -> int:
    """Pixels of a map; programs number them with 32 bits."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if pixels >= 2**31 - 2**27:
        raise ValueError(f"{op}: a map of {pixels} pixels is too large for one launch; use smaller tiles")
    return pixels


class Stream:
    """Launch parameters of a kernel that streams through maps of one size.

    Attributes:
        maps: the `Map` of each map.
        grid: shares of pixels x blocks of channels.
        share, tile: other arguments of the kernel.
        num_warps: warps of a program.
        length: folded pixels of a program.
        folds: pixels that are folded into one.
        pixels: pixels of the maps before folding.
    """

    def __init__(self, op: str, most_channels: int, *maps: Tensor | None, fold: bool = False):
        """`fold`: whether pixels may be folded into the channels; not if the kernel combines a pixel's channels."""
        x = next(x for x in maps if x is not None)
        self.pixels, channels = count_pixels(x, op), x.shape[1]
        self.folds = folds(self.pixels, most_channels, *maps) if fold else 1
        pixels, width = self.pixels // self.folds, channels * self.folds
        config = stream_config(pixels, width, most_channels)
        if self.folds > 1:
            self.maps = tuple(Map(x, 0, 0, 0 if x is None else width) for x in maps)
            rows, columns, flat, vec = 1, 1, True, math.gcd(width, 16 // x.element_size())
        else:
            self.maps = tuple(map(as_map, maps))
            rows, columns, flat, vec = x.shape[2], x.shape[3], is_flat(*maps), vector(*maps)
        self.grid = config.programs(pixels), -(-width // config.block_c)
        self.share = Share(pixels, rows, columns, width, channels, config.steps)
        self.tile = TileShape(config.block_m, config.block_c, flat, vec, accumulator(x.dtype))
        self.num_warps, self.length = config.num_warps, config.share

    def launch(self, kernel: Any, *vectors: Any, **options: Any) -> None:
        """Launch a kernel with the maps, these vectors (or numbers), the sizes and these options."""
        given = (v.contiguous() if isinstance(v, Tensor) else v for v in vectors)
        kernel[self.grid](*self.maps, *given, *self.share, TILE=self.tile, num_warps=self.num_warps, **options)

    def sums(self, like: Tensor, rows: int) -> Tensor:
        """An empty tensor for the sums of programs, (programs, rows, channels), channels folded."""
        shape = self.grid[0], rows, self.share.C
        return torch.empty(shape, dtype=sum_dtype(like.dtype), device=like.device)
