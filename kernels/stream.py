"""How kernels address maps, and how the programs of a kernel that streams through a map share its pixels.

A map travels into a kernel as a `Map`: where its first element lies, and how far apart images, rows and pixels are;
channels lie side by side. A map or vector that is not given has the address None, which the compiler sees.

A kernel that streams numbers the pixels of all images p = (n*H + i)*W + j. Each program takes `steps` tiles of BM
pixels and BC channels, one after another; programs along the first axis of the grid share the pixels, along the second
the channels.

Blocks of BC channels, a power of two, leave lanes idle where the channels are no multiple of it: 112 of 256 for 144. A
kernel that treats each channel by itself may therefore fold pixels of dense maps into the channels: P pixels of C
channels lie in memory as P/k pixels of k*C channels, of which the c-th is channel c % C of the map.
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
    """What the programs of a streaming kernel share: pixels of all images, rows, columns, channels; tiles of each.

    Channels are those that pixels are folded into; of a vector with a number for each channel of the map, the c-th of
    them takes number c % period.
    """

    pixels: int
    H: int
    W: int
    C: int
    period: int
    steps: int


# Given to kernels one by one: integers in a tuple are specialised on 1 and on multiples of 16 whatever
# `do_not_specialize` names, and a kernel would be compiled anew for most sizes of maps.
SHARE = list(Share._fields)


class Tile(NamedTuple):
    """Known when compiled: pixels, channels of a tile; whether pixels lie equally far apart; channels of a vector."""

    BM: int
    BC: int
    FLAT: bool
    VEC: int
    ACC: tl.dtype


@triton.jit
def whole(n, VEC: tl.constexpr):
    """`n`, a multiple of VEC, in a form that tells the compiler so: else it would not move VEC channels at once."""
    return n if VEC == 1 else n // VEC * VEC


@triton.jit
def place(m, n, i, j, VEC: tl.constexpr):
    """Offsets of pixels (i, j) of images n, 64 bits wide, of any shapes that go together."""
    return n * whole(m.sn, VEC) + i * whole(m.sh, VEC) + j * whole(m.sw, VEC)


@triton.jit
def pixel_offsets(m, p, H, W, FLAT: tl.constexpr, VEC: tl.constexpr):
    """Offsets [BM] of pixels p = (n*H + i)*W + j; FLAT if they all lie equally far apart."""
    if FLAT:
        offsets = p.to(tl.int64) * whole(m.sw, VEC)
    else:
        # Divided in 32 bits, which is cheap, but multiplied in 64.
        offsets = place(m, (p // (H * W)).to(tl.int64), (p // W % H).to(tl.int64), (p % W).to(tl.int64), VEC)
    return offsets


@triton.jit
def step_pixels(share, step, TILE: tl.constexpr):
    """Pixels [BM] of one step of this program."""
    return (tl.program_id(0) * share.steps + step) * TILE.BM + tl.arange(0, TILE.BM)


@triton.jit
def load(m, p, c, keep, share, TILE: tl.constexpr):
    """Channels c [BC] of pixels p [BM] of a map as [BM, BC] in ACC; zero where `keep` does not hold."""
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


def dense(*vectors: Tensor | None) -> tuple[Any, ...]:
    """Vectors as kernels read them, number after number: what is a column of something else, or expanded, is copied."""
    return tuple(None if t is None else t.contiguous() for t in vectors)


def as_map(x: Tensor | None) -> Map:
    """A map as kernels take it. A stride that nothing is multiplied by is 0: one compiled kernel for all of them."""
    if x is None:
        return Map(None, 0, 0, 0)
    return Map(x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(2) if x.shape[2] > 1 else 0, x.stride(3))


def vector(*maps: Tensor | None) -> int:
    """Channels that always begin at a multiple of 16 bytes of the first map, or as near to it as strides allow."""
    first, *others = (x for x in maps if x is not None)
    strides = [stride for x in (first, *others) for stride in as_map(x)[1:]]
    return math.gcd(first.shape[1], *(x.shape[1] for x in others), *strides, 16 // first.element_size())


def is_flat(*maps: Tensor | None) -> bool:
    """Whether in each map the pixels of all images lie equally far apart."""
    return all(
        (x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3))
        and (x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.shape[3] * x.stride(3))
        for x in maps
        if x is not None
    )


def folds(pixels: int, most_channels: int, *maps: Tensor | None) -> int:
    """Pixels that count as one to fill blocks of `most_channels`, a power of two; 1 unless all maps are dense."""
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
    """How one launch streams through maps of one size.

    Attributes:
        maps: the maps as the kernel takes them.
        grid: shares of pixels x blocks of channels.
        share, tile: what the kernel takes beside its maps.
        num_warps: of a program.
        length: pixels of a program, folded ones.
        folds: pixels that are folded into one.
        pixels: of the maps as they are.
    """

    def __init__(self, op: str, most_channels: int, *maps: Tensor | None, fold: bool = False):
        """`fold`: whether pixels may be folded into the channels; not where a kernel works across those of a pixel."""
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
        self.tile = Tile(config.block_m, config.block_c, flat, vec, accumulator(x.dtype))
        self.num_warps, self.length = config.num_warps, config.share

    def sums(self, like: Tensor, rows: int) -> Tensor:
        """Room for what the programs sum: (programs, rows, channels), folded ones."""
        shape = self.grid[0], rows, self.share.C
        return torch.empty(shape, dtype=sum_dtype(like.dtype), device=like.device)
