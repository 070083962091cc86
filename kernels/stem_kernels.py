"""Triton kernels of the stem and their launchers; `stem.py` has the formula."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import stem_reference
from .activations import activate, slope
from .dtypes import accumulator
from .precision import dot_precision
from .stem_reference import Stem
from .stream import as_map, dense
from .tiles import StemTile, stem_backward_tile, stem_lines, stem_share, stem_tile
from .triton_private import jit_kernel

NO_SPOT = tl.constexpr(stem_reference.NO_SPOT)


class ImageStrides(NamedTuple):
    """The image [N, C, H, W]: address, and strides of image, channel, row and pixel."""

    ptr: Tensor
    sn: int
    sc: int
    sh: int
    sw: int


class Filters(NamedTuple):
    """The filters [taps x channels, K], padded to whole tiles, and the shift."""

    ptr: Tensor
    shift: Tensor | None  # [K]
    K: int
    depth: int  # taps x channels
    width: int  # filters, padded


class Extents(NamedTuple):
    """Rows and columns of image, conv outputs and y; the starts of the first windows and their strides.

    Passed one by one, like a `Share`.
    """

    H: int
    W: int
    OH: int
    OW: int
    PH: int
    PW: int
    top: int
    left: int
    stride_h: int
    stride_w: int
    pool_top: int
    pool_left: int


class Form(NamedTuple):
    """Compile-time constants: channels, rows and columns of a filter; pixels, filters and taps of a tile; the rest."""

    C: int
    R: int
    S: int
    BM: int
    BN: int
    BK: int
    ACT: str
    PRECISION: str
    ACC: tl.dtype


@triton.jit
def _patches(image, x, at, row, columns, d, dtype: tl.constexpr, FORM: tl.constexpr):
    """[BM, BK] pixels under taps d = (r * S + s) * C + c of filters that begin at `row` and `columns`."""
    c, s, r = d % FORM.C, d // FORM.C % FORM.S, d // (FORM.C * FORM.S)
    h = row + r  # [BK]
    w = columns[:, None] + s[None, :]  # [BM, BK]
    hit = ((h >= 0) & (h < at.H) & (r < FORM.R))[None, :] & (w >= 0) & (w < at.W)
    taps = h.to(tl.int64) * x.sh + s.to(tl.int64) * x.sw + c.to(tl.int64) * x.sc
    v = tl.load(image + (columns.to(tl.int64) * x.sw)[:, None] + taps[None, :], mask=hit, other=0).to(FORM.ACC)
    return v.to(dtype)


@triton.jit
def _conv(image, x, w, at, ci, cj, k, FORM: tl.constexpr):
    """[BM, BN] conv(x, w) at conv line ci, columns cj; minus infinity where no such output exists."""
    BM: tl.constexpr = FORM.BM
    BN: tl.constexpr = FORM.BN
    acc = tl.zeros((BM, BN), FORM.ACC)
    for b in range(tl.cdiv(w.depth, FORM.BK)):
        d = b * FORM.BK + tl.arange(0, FORM.BK)
        row, columns = ci * at.stride_h - at.top, cj * at.stride_w - at.left
        a = _patches(image, x, at, row, columns, d, w.ptr.dtype.element_ty, FORM)
        filters = tl.load(w.ptr + d[:, None] * w.width + k[None, :])
        acc = tl.dot(a, filters, acc, input_precision=FORM.PRECISION, out_dtype=FORM.ACC)
    return tl.where(((ci >= 0) & (ci < at.OH) & (cj >= 0) & (cj < at.OW))[:, None], acc, float("-inf"))


@triton.jit
def _store_row(y, spots, at_image, w, at, i, j, k, z, spot, FORM: tl.constexpr):
    """Write act(z + shift) and its spots to row i, columns j of an image of y."""
    ACT: tl.constexpr = FORM.ACT
    if w.shift is not None:
        z += tl.load(w.shift + k, mask=k < w.K, other=0.0).to(FORM.ACC)[None, :]
    keep = (j < at.PW)[:, None] & (k < w.K)[None, :]
    pixels = at_image * y.sn + i.to(tl.int64) * y.sh + j.to(tl.int64) * y.sw
    tl.store(y.ptr + pixels[:, None] + k[None, :], activate(z, ACT).to(y.ptr.dtype.element_ty), mask=keep)
    if spots.ptr is not None:
        if ACT != "none":
            spot = tl.where(slope(z, ACT) != 0.0, spot, NO_SPOT)
        pixels = at_image * spots.sn + i.to(tl.int64) * spots.sh + j.to(tl.int64) * spots.sw
        tl.store(spots.ptr + pixels[:, None] + k[None, :], spot.to(tl.uint8), mask=keep)


@jit_kernel([*Extents._fields, "lines", "strips", "segments"])
def _stem_forward_kernel(
    x,  # pixels [N, C, H, W]
    w,  # filters [taps x channels, K]
    y,  # map [N, K, PH, PW]
    spots,  # map [N, K, PH, PW] of bytes, or None
    H,
    W,
    OH,
    OW,
    PH,
    PW,
    top,
    left,
    stride_h,
    stride_w,
    pool_top,
    pool_left,
    lines,  # rows of y per program
    strips,  # programs per image
    segments,  # programs per row
    FORM: tl.constexpr,
):
    """y, and its spots, in `lines` rows of BM pixels and BN filters."""
    BM: tl.constexpr = FORM.BM
    BN: tl.constexpr = FORM.BN
    at = Extents(H, W, OH, OW, PH, PW, top, left, stride_h, stride_w, pool_top, pool_left)
    pid = tl.program_id(0)
    blocks = tl.cdiv(w.K, BN)
    k = (pid % blocks) * BN + tl.arange(0, BN)
    j = (pid // blocks % segments) * BM + tl.arange(0, BM)
    i = pid // blocks // segments % strips * lines
    n = (pid // blocks // segments // strips).to(tl.int64)
    image = x.ptr + n * x.sn
    rows = min(lines, at.PH - i)

    best = tl.full((BM, BN), float("-inf"), FORM.ACC)
    spot = tl.zeros((BM, BN), tl.int32)
    # Conv lines 2i, 2i + 1 and 2i + 2 make row i of y, and the last of them is also the first of row i + 1.
    for t in range(2 * rows + 1):
        line = tl.full((BM, BN), float("-inf"), FORM.ACC)
        # The higher bits of `spot` store the column of the line's maximum, because registers are scarce.
        spot = spot & 255
        for dj in range(3):
            z = _conv(image, x, w, at, 2 * i - at.pool_top + t, 2 * j - at.pool_left + dj, k, FORM)
            # An equal value replaces nothing, NaN everything, as in PyTorch; tl.maximum would drop NaN on a GPU.
            better = (z > line) | (z != z)
            spot = tl.where(better, (spot & 255) | (dj << 8), spot)
            line = tl.where(better, z, line)
        column = spot >> 8
        better = (line > best) | (line != line)
        spot = tl.where(better, (column << 8) | (column + 3 * (2 - t % 2)), spot)
        best = tl.where(better, line, best)
        if t % 2 == 0:
            if t > 0:
                _store_row(y, spots, n, w, at, i + t // 2 - 1, j, k, best, spot & 255, FORM)
            best, spot = line, column


@jit_kernel([*Extents._fields, "tiles", "share", "segments"])
def _stem_backward_kernel(
    x,  # pixels [N, C, H, W]
    dy,  # map [N, K, PH, PW]
    spots,  # map [N, K, PH, PW] of bytes
    g_ptr,  # [splits, K, depth], partial sums of dz^T patches
    s_ptr,  # [splits, K], partial sums of dz
    H,
    W,
    OH,
    OW,
    PH,
    PW,
    top,
    left,
    stride_h,
    stride_w,
    pool_top,
    pool_left,
    K,
    depth,  # taps x channels
    tiles,  # segments of all conv lines
    share,  # segments per program
    segments,  # segments per line
    FORM: tl.constexpr,
):
    """The sums of `share` segments of BM conv outputs, for BN filters and BK taps."""
    BM: tl.constexpr = FORM.BM
    BN: tl.constexpr = FORM.BN
    BK: tl.constexpr = FORM.BK
    SIDE: tl.constexpr = 3  # of a pooling window
    STEP: tl.constexpr = 2
    at = Extents(H, W, OH, OW, PH, PW, top, left, stride_h, stride_w, pool_top, pool_left)
    pid = tl.program_id(0)
    parts = tl.cdiv(depth, BK)
    blocks = tl.cdiv(K, BN)
    d = (pid % parts) * BK + tl.arange(0, BK)
    k = (pid // parts % blocks) * BN + tl.arange(0, BN)
    split = pid // parts // blocks

    products = tl.zeros((BN, BK), FORM.ACC)
    sums = tl.zeros((BM, BN), FORM.ACC)
    for tile in range(split * share, min((split + 1) * share, tiles)):
        # Lines first: the next line reads most of the pixels and half of the windows of this one, from the cache.
        ci = tile % at.OH
        cj = (tile // at.OH % segments) * BM + tl.arange(0, BM)
        n = (tile // at.OH // segments).to(tl.int64)
        dz = tl.zeros((BM, BN), FORM.ACC)
        for r in range((ci + at.pool_top) % STEP, SIDE, STEP):  # this line is row r of windows i
            i = (ci + at.pool_top - r) // STEP
            for offset in tl.static_range(STEP):
                s = (cj + at.pool_left) % STEP + offset * STEP  # [BM]
                j = (cj + at.pool_left - s) // STEP
                hit = (i >= 0) & (i < at.PH) & (cj < at.OW) & (s < SIDE) & (j >= 0) & (j < at.PW)
                keep = hit[:, None] & (k < K)[None, :]
                pixels = n * dy.sn + i.to(tl.int64) * dy.sh + j.to(tl.int64) * dy.sw
                g = tl.load(dy.ptr + pixels[:, None] + k[None, :], mask=keep, other=0.0)
                pixels = n * spots.sn + i.to(tl.int64) * spots.sh + j.to(tl.int64) * spots.sw
                spot = tl.load(spots.ptr + pixels[:, None] + k[None, :], mask=keep, other=NO_SPOT)
                dz += tl.where(spot.to(tl.int32) == (r * SIDE + s)[:, None], g.to(FORM.ACC), 0.0)
        sums += dz
        kind = dy.ptr.dtype.element_ty
        row, columns = ci * at.stride_h - at.top, cj * at.stride_w - at.left
        v = _patches(x.ptr + n * x.sn, x, at, row, columns, d, kind, FORM)
        products = tl.dot(dz.to(kind).T, v, products, input_precision=FORM.PRECISION, out_dtype=FORM.ACC)

    to = split.to(tl.int64) * K + k  # [BN] rows of partial sums
    owned = (k < K)[:, None] & (d < depth)[None, :]
    tl.store(g_ptr + to[:, None] * depth + d[None, :], products, mask=owned)
    tl.store(s_ptr + to, tl.sum(sums, 0), mask=(k < K) & (pid % parts == 0))


def _arguments(stem: Stem, tile: StemTile) -> tuple[ImageStrides, Extents, Form]:
    """The common arguments of both kernels."""
    x, geometry, kind = stem.x, stem.geometry, stem.weight.dtype
    top, _, left, _ = stem.pool_padding
    return (
        ImageStrides(x, *x.stride()),
        Extents(
            *x.shape[2:], *stem.conv_size, *stem.shape[2:], geometry.top, geometry.left, *geometry.stride, top, left
        ),
        Form(
            *(*stem.weight.shape[1:], tile.pixels, tile.filters, tile.taps),
            *(stem.act, dot_precision(kind), accumulator(kind)),
        ),
    )


def _filters(stem: Stem, tile: StemTile) -> Filters:
    """Filters padded with zeros to whole tiles, to be read in long words and without masks."""
    depth, k = stem.matrix.shape
    padded = F.pad(stem.matrix, [0, -k % tile.filters, 0, -depth % tile.taps]).contiguous()
    return Filters(padded, dense(stem.shift), k, depth, padded.shape[1])


def stem_forward(stem: Stem, y: Tensor, spots: Tensor | None = None) -> None:
    """Write y and, if given, its spots, (N, K, PH, PW) windows; see the formula of `stem.py`."""
    stem.check_map("y", y)
    if spots is not None:
        stem.check_map("spots", spots)
    if not y.numel():
        return
    n, filters, rows, width = y.shape
    tile = stem_tile(stem.weight, width)
    segments, blocks = triton.cdiv(width, tile.pixels), triton.cdiv(filters, tile.filters)
    lines = stem_lines(rows, n * rows * segments * blocks)
    strips = triton.cdiv(rows, lines)
    x, at, form = _arguments(stem, tile)
    _stem_forward_kernel[(n * strips * segments * blocks,)](
        x, _filters(stem, tile), as_map(y), as_map(spots), *at, lines, strips, segments, FORM=form, **tile.options
    )


def stem_backward(stem: Stem, dy: Tensor, spots: Tensor, dweight: Tensor, dshift: Tensor) -> None:
    """Add the gradients of weight and shift to the given buffers.

    Args:
        dy: (N, K, PH, PW) window in the dtype of weight, the gradient of y.
        spots: a window of bytes of the same shape, from the forward.
        dweight, dshift: (K, C, R, S) and (K,), in float32 (float64 for weights in float64).
    """
    stem.check_map("dy", dy)
    stem.check_map("spots", spots)
    if not dy.numel():
        return
    (k, c, r, s), (lines, width) = stem.weight.shape, stem.conv_size
    depth = c * r * s
    tile = stem_backward_tile(stem.weight, width)
    segments = triton.cdiv(width, tile.pixels)
    tiles = len(dy) * lines * segments
    share = stem_share(tiles)
    splits = triton.cdiv(tiles, share)
    sums = torch.empty(splits, k, depth, dtype=dweight.dtype, device=dy.device)
    shifts = torch.empty(splits, k, dtype=dweight.dtype, device=dy.device)
    x, at, form = _arguments(stem, tile)
    _stem_backward_kernel[(splits * triton.cdiv(k, tile.filters) * triton.cdiv(depth, tile.taps),)](
        x, as_map(dy), as_map(spots), sums, shifts, *at, k, depth, tiles, share, segments, FORM=form, **tile.options
    )
    dshift += shifts.sum(0)
    dweight += sums.sum(0).reshape(k, r, s, c).permute(0, 3, 1, 2)
