"""The stem in Triton: kernels and their launchers; the formula stands in `stem.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, slope
from .dtypes import accumulator
from .precision import dot_precision
from .stem_reference import Stem
from .stream import as_map
from .tiles import StemTile, stem_lines, stem_share, stem_tile


class Pixels(NamedTuple):
    """The image [N, C, H, W]: address, strides of image, channel, row, pixel; sizes; how pixels are normalised."""

    ptr: Tensor
    sn: int
    sc: int
    sh: int
    sw: int
    H: int
    W: int
    gain: Tensor | None  # [C]
    offset: Tensor | None  # [C]
    low: float | None
    high: float | None


class Filters(NamedTuple):
    """The filters [taps x channels, K], padded to whole tiles, and what follows the product."""

    ptr: Tensor
    scale: Tensor | None  # [K]
    shift: Tensor | None  # [K]
    K: int
    depth: int  # taps x channels
    width: int  # filters, padded


class Places(NamedTuple):
    """Rows and columns of conv outputs and of y; where the first windows begin and how far apart they are."""

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
    """Known when compiled: channels, rows and columns of a filter; pixels, filters and taps of a tile; the rest."""

    C: int
    R: int
    S: int
    BM: int
    BN: int
    BK: int
    POOL: bool
    ACT: str
    PRECISION: str
    ACC: tl.dtype


@triton.jit
def _patches(image, x, row, columns, d, dtype: tl.constexpr, FORM: tl.constexpr):
    """[BM, BK] normalised pixels under taps d = (r * S + s) * C + c of filters that begin at `row` and `columns`."""
    c, s, r = d % FORM.C, d // FORM.C % FORM.S, d // (FORM.C * FORM.S)
    h = row + r  # [BK]
    w = columns[:, None] + s[None, :]  # [BM, BK]
    hit = ((h >= 0) & (h < x.H) & (r < FORM.R))[None, :] & (w >= 0) & (w < x.W)
    taps = h.to(tl.int64) * x.sh + s.to(tl.int64) * x.sw + c.to(tl.int64) * x.sc
    v = tl.load(image + (columns.to(tl.int64) * x.sw)[:, None] + taps[None, :], mask=hit, other=0).to(FORM.ACC)
    if x.gain is not None:
        v = v * tl.load(x.gain + c).to(FORM.ACC)[None, :] + tl.load(x.offset + c).to(FORM.ACC)[None, :]
    if x.low is not None:
        v = tl.minimum(tl.maximum(v, x.low), x.high)
    if x.gain is not None or x.low is not None:
        v = tl.where(hit, v, 0.0)
    return v.to(dtype)


@triton.jit
def _conv(image, x, w, at, ci, cj, k, FORM: tl.constexpr):
    """[BM, BN] conv(v, w) * scale at conv line ci, columns cj; minus infinity where there is no such output."""
    BM: tl.constexpr = FORM.BM
    BN: tl.constexpr = FORM.BN
    acc = tl.zeros((BM, BN), FORM.ACC)
    for b in range(tl.cdiv(w.depth, FORM.BK)):
        d = b * FORM.BK + tl.arange(0, FORM.BK)
        row, columns = ci * at.stride_h - at.top, cj * at.stride_w - at.left
        a = _patches(image, x, row, columns, d, w.ptr.dtype.element_ty, FORM)
        filters = tl.load(w.ptr + d[:, None] * w.width + k[None, :])
        acc = tl.dot(a, filters, acc, input_precision=FORM.PRECISION, out_dtype=FORM.ACC)
    if w.scale is not None:
        acc *= tl.load(w.scale + k, mask=k < w.K, other=0.0).to(FORM.ACC)[None, :]
    return tl.where(((ci >= 0) & (ci < at.OH) & (cj >= 0) & (cj < at.OW))[:, None], acc, float("-inf"))


@triton.jit
def _shifted(z, w, k, FORM: tl.constexpr):
    if w.shift is not None:
        z += tl.load(w.shift + k, mask=k < w.K, other=0.0).to(FORM.ACC)[None, :]
    return z


@triton.jit
def _store_row(y, image, w, at, i, j, k, z, FORM: tl.constexpr):
    """Write act(z + shift) to row i, columns j of an image of y."""
    ACT: tl.constexpr = FORM.ACT
    values = activate(_shifted(z, w, k, FORM), ACT)
    pixels = i.to(tl.int64) * y.sh + j.to(tl.int64) * y.sw
    keep = (j < at.PW)[:, None] & (k < w.K)[None, :]
    tl.store(image + pixels[:, None] + k[None, :], values.to(y.ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["lines", "strips", "segments"])
def _stem_forward_kernel(
    x,  # pixels [N, C, H, W]
    w,  # filters [taps x channels, K]
    y,  # map [N, K, PH, PW]
    at,
    lines,  # rows of y of a program
    strips,  # programs of an image
    segments,  # programs of a row
    FORM: tl.constexpr,
):
    """y in `lines` rows of BM pixels and BN filters."""
    BM: tl.constexpr = FORM.BM
    BN: tl.constexpr = FORM.BN
    pid = tl.program_id(0)
    blocks = tl.cdiv(w.K, BN)
    k = (pid % blocks) * BN + tl.arange(0, BN)
    j = (pid // blocks % segments) * BM + tl.arange(0, BM)
    i = pid // blocks // segments % strips * lines
    n = (pid // blocks // segments // strips).to(tl.int64)
    image, made = x.ptr + n * x.sn, y.ptr + n * y.sn
    rows = min(lines, at.PH - i)

    if FORM.POOL:
        best = tl.full((BM, BN), float("-inf"), FORM.ACC)
        # Conv lines 2i, 2i + 1 and 2i + 2 make row i of y, and the last of them is also the first of row i + 1.
        for t in range(2 * rows + 1):
            line = tl.full((BM, BN), float("-inf"), FORM.ACC)
            for dj in range(3):
                z = _conv(image, x, w, at, 2 * i - at.pool_top + t, 2 * j - at.pool_left + dj, k, FORM)
                line = tl.maximum(line, z)
            best = tl.maximum(best, line)
            if t % 2 == 0:
                if t > 0:
                    _store_row(y, made, w, at, i + t // 2 - 1, j, k, best, FORM)
                best = line
    else:
        for t in range(rows):
            _store_row(y, made, w, at, i + t, j, k, _conv(image, x, w, at, i + t, j, k, FORM), FORM)


@triton.jit(do_not_specialize=["tiles", "share", "segments"])
def _stem_backward_kernel(
    x,  # pixels [N, C, H, W]
    w,  # filters [taps x channels, K]
    dy,  # map [N, K, PH, PW]
    g_ptr,  # [splits, K, depth], partial sums of g^T patches
    s_ptr,  # [splits, K], partial sums of g
    at,
    tiles,  # segments of rows of y in all
    share,  # of one program
    segments,  # of one row
    FORM: tl.constexpr,
):
    """The sums of `share` segments of BM pixels, for BN filters."""
    BM: tl.constexpr = FORM.BM
    BN: tl.constexpr = FORM.BN
    ACT: tl.constexpr = FORM.ACT
    SPOTS: tl.constexpr = 9 if FORM.POOL else 1  # conv outputs that one pixel of y chooses from
    STEP: tl.constexpr = 2 if FORM.POOL else 1
    pid = tl.program_id(0)
    blocks = tl.cdiv(w.K, BN)
    k = (pid % blocks) * BN + tl.arange(0, BN)
    split = pid // blocks

    sums = tl.zeros((BN,), FORM.ACC)
    first = split * share
    row = split.to(tl.int64) * w.K + k  # [BN] rows of partial sums
    for tile in range(first, min(first + share, tiles)):
        j = (tile % segments) * BM + tl.arange(0, BM)
        i = tile // segments % at.PH
        n = (tile // segments // at.PH).to(tl.int64)
        image = x.ptr + n * x.sn
        ci, cj = STEP * i - at.pool_top, STEP * j - at.pool_left
        pixels = n * dy.sn + i.to(tl.int64) * dy.sh + j.to(tl.int64) * dy.sw
        keep = (j < at.PW)[:, None] & (k < w.K)[None, :]
        g = tl.load(dy.ptr + pixels[:, None] + k[None, :], mask=keep, other=0.0).to(FORM.ACC)

        spot = tl.zeros((BM, BN), tl.int32)
        if FORM.POOL or ACT != "none":
            best = tl.full((BM, BN), float("-inf"), FORM.ACC)
            for o in range(SPOTS):
                z = _conv(image, x, w, at, ci + o // 3, cj + o % 3, k, FORM)
                spot = tl.where(z > best, o, spot)  # an equal value later does not displace the first
                best = tl.maximum(best, z)
            if ACT != "none":
                g *= slope(_shifted(best, w, k, FORM), ACT)
        sums += tl.sum(g, 0)

        # The products wait in memory (in L2, in fact) between tiles: with those of 147 taps registers would run out.
        for b in range(tl.cdiv(w.depth, FORM.BK)):
            d = b * FORM.BK + tl.arange(0, FORM.BK)
            to = g_ptr + row[:, None] * w.depth + d[None, :]
            owned = (k < w.K)[:, None] & (d < w.depth)[None, :]
            products = tl.load(to, mask=owned & (tile > first), other=0.0)
            for o in range(SPOTS):
                here = tl.where(spot == o, g, 0.0).to(w.ptr.dtype.element_ty)
                line, columns = (ci + o // 3) * at.stride_h - at.top, (cj + o % 3) * at.stride_w - at.left
                v = _patches(image, x, line, columns, d, w.ptr.dtype.element_ty, FORM)
                products = tl.dot(here.T, v, products, input_precision=FORM.PRECISION, out_dtype=FORM.ACC)
            tl.store(to, products, mask=owned)

    tl.store(s_ptr + row, sums, mask=k < w.K)


def _arguments(stem: Stem, tile: StemTile) -> tuple[Pixels, Filters, Places, Form]:
    """What both kernels take."""
    x, matrix, (k, c, r, s) = stem.pixels, stem.matrix, stem.weight.shape
    depth = matrix.shape[0]
    # Zeros up to whole tiles: filters are read in long words and without masks.
    padded = F.pad(matrix, [0, -k % tile.filters, 0, -depth % tile.taps]).contiguous()
    bounds = (float(stem.low), float(stem.high)) if stem.clamps else (None, None)
    top, _, left, _ = stem.pool_padding or (0, 0, 0, 0)
    geometry, kind = stem.geometry, stem.weight.dtype
    return (
        Pixels(x, *x.stride(), *x.shape[2:], stem.gain, stem.offset, *bounds),
        Filters(padded, stem.scale, stem.shift, k, depth, padded.shape[1]),
        Places(*stem.conv_size, *stem.shape[2:], geometry.top, geometry.left, *geometry.stride, top, left),
        Form(
            *(c, r, s, tile.pixels, tile.filters, tile.taps),
            *(stem.pool_padding is not None, stem.act, dot_precision(kind), accumulator(kind)),
        ),
    )


def stem_forward(stem: Stem, y: Tensor) -> None:
    """Write y, an (N, K, PH, PW) window; see the formula above."""
    stem.check_map("y", y)
    if not y.numel():
        return
    n, filters, rows, width = y.shape
    tile = stem_tile(stem.weight, width)
    segments, blocks = triton.cdiv(width, tile.pixels), triton.cdiv(filters, tile.filters)
    lines = stem_lines(rows, n * rows * segments * blocks)
    strips = triton.cdiv(rows, lines)
    x, w, at, form = _arguments(stem, tile)
    _stem_forward_kernel[(n * strips * segments * blocks,)](
        x, w, as_map(y), at, lines, strips, segments, FORM=form, **tile.options
    )


def stem_backward(
    stem: Stem, dy: Tensor, dweight: Tensor, *, dscale: Tensor | None = None, dshift: Tensor | None = None
) -> None:
    """Add the gradients of weight, scale and shift to the buffers given.

    Args:
        dy: (N, K, PH, PW) window in the dtype of weight, the gradient of y.
        dweight, dscale, dshift: (K, C, R, S), (K,) and (K,), in float32 (float64 for weights in float64).
    """
    stem.check_map("dy", dy)
    if not dy.numel():
        return
    n, filters, rows, width = dy.shape
    tile = stem_tile(stem.weight, width)
    segments, blocks = triton.cdiv(width, tile.pixels), triton.cdiv(filters, tile.filters)
    tiles = n * rows * segments
    share = stem_share(tiles)
    splits = triton.cdiv(tiles, share)
    x, w, at, form = _arguments(stem, tile)
    sums = torch.empty(splits, filters, w.depth, dtype=dweight.dtype, device=x.ptr.device)
    shifts = torch.empty(splits, filters, dtype=dweight.dtype, device=x.ptr.device)
    _stem_backward_kernel[(splits * blocks,)](
        x, w, as_map(dy), sums, shifts, at, tiles, share, segments, FORM=form, **tile.options
    )
    total = sums.sum(0)
    if dshift is not None:
        dshift += shifts.sum(0)
    if dscale is not None:
        dscale += (stem.matrix.T.to(total.dtype) * total).sum(1)
    if stem.scale is not None:
        total *= stem.scale.to(total.dtype)[:, None]
    k, c, r, s = stem.weight.shape
    dweight += total.reshape(k, r, s, c).permute(0, 3, 1, 2)
