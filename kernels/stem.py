"""Fused stem, from stored pixels to the first map of a network, one pass over memory:

    v = clamp(pixel * gain[c] + offset[c], low, high)          windowing and normalisation
    z = conv(v, w) * scale + shift                             v is rounded to the dtype of w first
    y = maxpool(act(z)), 3 x 3 with stride 2, or act(z)

Pixels are uint8, uint16, or floating point, in any memory order, so a decoded image is read as it is. The convolution
is padded with zeros after normalisation, the pooling with minus infinity, both only where the image ends: `padding` and
`pool_padding` say how much of either the window lacks.

Nothing but y is stored. At one gigapixel a stock ResNet keeps 34 GB of this stage's intermediates in bfloat16; here the
backward computes them again from the pixels, which costs less time than reading them back would.

As a matrix product: rows are pixels of y, columns filters, depth is taps x channels (49 or 147). For pooling, a program
walks down a strip of conv lines and keeps the running maximum; every conv line is shared by the two rows of y that
need it, while of the columns every second is computed twice (1.5 times the arithmetic, none of the traffic).
Activations never decrease, so they are applied to the maximum.

Backward: each pixel of y sends its gradient to the first position, row by row, that holds the maximum, as PyTorch does.
With g the gradient of y there, times the activation's slope,

    G = sum of g^T patches,   dw = scale * G,   dshift = sum of g,   dscale = sum over taps of w * G

so neither the scale nor any division enters the sums. They are split over programs and added in order: two runs agree
bit by bit. The image's gradient, which only saliency maps ask for, is left to `stem_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, activate_reference, slope, slope_reference
from .choice import run_fastest
from .dtypes import accumulator, sum_dtype
from .precision import dot_precision
from .stream import as_map
from .tuning import StemTile, stem_lines, stem_share, stem_tile
from .windows import ConvGeometry, empty_map, nhwc, output_size

ACTIVATIONS = ("none", "relu", "relu6")  # those that never decrease


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


@dataclass(frozen=True, eq=False)
class Stem:
    """One stem and the pixels it is applied to.

    Attributes:
        x: (N, C, H, W) pixels with any strides: uint8, uint16 (also as the bits of int16) or floating point.
        weight: (K, C, R, S), in the dtype to compute in.
        scale, shift: (K,), or None.
        gain, offset: (C,) floating point, or neither.
        low, high: between them normalised pixels are clamped.
        geometry: of the convolution, padded with zeros after normalisation.
        pool_padding: (top, bottom, left, right) of the pooling, each 0 or 1; None for no pooling.

    Raises:
        ValueError: for what the kernels cannot do.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    low: float
    high: float
    geometry: ConvGeometry
    pool_padding: Sequence[int] | None
    act: str

    def __post_init__(self) -> None:
        channels, wanted, pool = self.x.shape[1], self.weight.shape[1], self.pool_padding
        if self.act not in ACTIVATIONS:
            raise ValueError(
                f"stem: activation {self.act!r} may decrease, so it cannot follow the pooling; use one of {ACTIVATIONS}"
            )
        if (self.gain is None) != (self.offset is None):
            raise ValueError("stem: gain without offset, or offset without gain; give both or neither")
        if channels != wanted:
            raise ValueError(f"stem: {channels} channels of pixels, filters for {wanted}; give as many")
        if min(self.geometry.padding) < 0 or (pool is not None and not 0 <= min(pool) <= max(pool) <= 1):
            raise ValueError(
                f"stem: padding {self.geometry.padding}, pool_padding {pool}; give sizes, for the pooling 0 or 1"
            )

    @property
    def pixels(self) -> Tensor:
        """x; int16 is PyTorch's older name for the bits of uint16."""
        return self.x.view(torch.uint16) if self.x.dtype == torch.int16 else self.x

    @property
    def clamps(self) -> bool:
        return self.low > -math.inf or self.high < math.inf

    @property
    def conv_size(self) -> tuple[int, int]:
        """Rows and columns of conv outputs."""
        return self.geometry.output(self.x, self.weight.shape[2:])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of y."""
        oh, ow = self.conv_size
        if self.pool_padding is not None:
            top, bottom, left, right = self.pool_padding
            oh, ow = output_size(oh, 3, 2, 1, top, bottom), output_size(ow, 3, 2, 1, left, right)
        return self.x.shape[0], self.weight.shape[0], oh, ow

    @property
    def matrix(self) -> Tensor:
        """The filters as [taps x channels, K]."""
        return self.weight.permute(2, 3, 1, 0).reshape(-1, self.weight.shape[0])

    @property
    def settings(self) -> tuple:
        """What the time depends on besides the pixels."""
        named = ("scale", self.scale), ("shift", self.shift), ("gain", self.gain), ("offset", self.offset)
        given = [name for name, t in named if t is not None]
        kind = *self.weight.shape, str(self.weight.dtype), *given
        return (*kind, *self.geometry.form, self.pool_padding is not None, self.act)

    def check_map(self, name: str, y: Tensor) -> None:
        if y.shape != self.shape or (y.stride(1) != 1 and y.shape[1] > 1):
            raise ValueError(
                f"stem: {name} is {tuple(y.shape)}, {y.stride()}; give a channels-last map of {self.shape}"
            )

    def arguments(self, tile: StemTile) -> tuple[Pixels, Filters, Places, Form]:
        """What both kernels take."""
        x, matrix, (k, c, r, s) = self.pixels, self.matrix, self.weight.shape
        depth = matrix.shape[0]
        # Zeros up to whole tiles: filters are read in long words and without masks.
        padded = F.pad(matrix, [0, -k % tile.filters, 0, -depth % tile.taps]).contiguous()
        bounds = (float(self.low), float(self.high)) if self.clamps else (None, None)
        top, _, left, _ = self.pool_padding or (0, 0, 0, 0)
        geometry, kind = self.geometry, self.weight.dtype
        return (
            Pixels(x, *x.stride(), *x.shape[2:], self.gain, self.offset, *bounds),
            Filters(padded, self.scale, self.shift, k, depth, padded.shape[1]),
            Places(*self.conv_size, *self.shape[2:], geometry.top, geometry.left, *geometry.stride, top, left),
            Form(
                *(c, r, s, tile.pixels, tile.filters, tile.taps),
                *(self.pool_padding is not None, self.act, dot_precision(kind), accumulator(kind)),
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
    x, w, at, form = stem.arguments(tile)
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
    x, w, at, form = stem.arguments(tile)
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


def _normalised(stem: Stem) -> Tensor:
    """The padded window of values that the convolution reads."""
    v = stem.pixels.to(torch.promote_types(stem.weight.dtype, torch.float32))
    if stem.gain is not None and stem.offset is not None:
        v = v * stem.gain.reshape(-1, 1, 1) + stem.offset.reshape(-1, 1, 1)
    if stem.clamps:
        v = v.clamp(stem.low, stem.high)
    return stem.geometry.padded(v.to(stem.weight.dtype))


def _activated(stem: Stem, v: Tensor) -> Tensor:
    """act(conv(v, w) * scale + shift) of normalised values."""
    z = F.conv2d(v, stem.weight, None, stem.geometry.stride)
    if stem.scale is not None:
        z = z * stem.scale.reshape(-1, 1, 1)
    if stem.shift is not None:
        z = z + stem.shift.reshape(-1, 1, 1)
    return activate_reference(z, stem.act)


def _pool_padded(stem: Stem, y: Tensor) -> Tensor:
    top, bottom, left, right = stem.pool_padding or (0, 0, 0, 0)
    return F.pad(y, [left, right, top, bottom], value=-math.inf)


def stem_reference(stem: Stem) -> Tensor:
    """y in plain PyTorch: normalised in float32 or better, the rest in the dtype of weight."""
    y = _activated(stem, _normalised(stem))
    return y if stem.pool_padding is None else F.max_pool2d(_pool_padded(stem, y), 3, 2)


def _given(x, weight, scale, shift, gain, offset, low, high, geometry, pool_padding, act) -> Stem:
    """The arguments of the registered ops as one."""
    return Stem(x, weight, scale, shift, gain, offset, low, high, ConvGeometry(*geometry), pool_padding, act)


@torch.library.custom_op("gigamorph::stem", mutates_args=())
def stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    low: float,
    high: float,
    geometry: Sequence[int],
    pool_padding: Sequence[int] | None,
    act: str,
) -> Tensor:
    """y of a `Stem`. Differentiable in weight, scale and shift."""
    given = _given(x, weight, scale, shift, gain, offset, low, high, geometry, pool_padding, act)

    def ours() -> Tensor:
        y = empty_map(*given.shape, like=weight)
        stem_forward(given, y)
        return y

    return run_fastest("stem", x, given.settings, ours, lambda: nhwc(stem_reference(given)))


@stem.register_fake
def _(*arguments) -> Tensor:
    given = _given(*arguments)
    return empty_map(*given.shape, like=given.weight)


@torch.library.custom_op("gigamorph::stem_gradients", mutates_args=())
def stem_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    low: float,
    high: float,
    geometry: Sequence[int],
    pool_padding: Sequence[int] | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, scale and shift, in float32 or float64; see `stem_backward`."""
    given = _given(x, weight, scale, shift, gain, offset, low, high, geometry, pool_padding, act)
    dy = dy.contiguous(memory_format=torch.channels_last)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        dweight, dscale, dshift = (t.zero_() for t in _buffers(weight))
        stem_backward(given, dy, dweight, dscale=dscale, dshift=dshift)
        return dweight, dscale, dshift

    return run_fastest("stem_gradients", x, given.settings, ours, lambda: _gradients_stock(given, dy))


def _buffers(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide, filters = sum_dtype(weight.dtype), weight.shape[0]
    dweight = torch.empty(weight.shape, dtype=wide, device=weight.device)
    return dweight, dweight.new_empty(filters), dweight.new_empty(filters)


def _gradients_stock(stem: Stem, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with PyTorch's own ops, what they need computed again."""
    wide, aten = sum_dtype(stem.weight.dtype), torch.ops.aten
    v = _normalised(stem)
    y = _activated(stem, v)
    if stem.pool_padding is not None:
        padded = _pool_padded(stem, y)
        window = [3, 3], [2, 2], [0, 0], [1, 1], False
        _, indices = aten.max_pool2d_with_indices(padded, *window)
        dy = aten.max_pool2d_with_indices_backward(dy, padded, *window, indices)
        top, _, left, _ = stem.pool_padding
        dy = dy[:, :, top : top + y.shape[2], left : left + y.shape[3]]
    dz = dy * slope_reference(y, stem.act)
    dshift = dz.sum((0, 2, 3), dtype=wide)
    stride, mask = list(stem.geometry.stride), [False, True, False]
    dweight = aten.convolution_backward(dz, v, stem.weight, None, stride, [0, 0], [1, 1], False, [0, 0], 1, mask)[1]
    dweight = dweight.to(wide)
    dscale = (dweight * stem.weight).sum((1, 2, 3))
    if stem.scale is not None:
        dweight = dweight * stem.scale.to(wide).reshape(-1, 1, 1, 1)
    return dweight, dscale, dshift


@stem_gradients.register_fake
def _(dy, x, weight, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return _buffers(weight)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.arguments = inputs[6:]


def _differentiate(ctx, dy):
    x, weight, scale, shift, *window = ctx.saved_tensors
    inputs = (x, weight, scale, shift, *window, *ctx.arguments)
    grads: list[Tensor | None] = [None] * len(inputs)
    if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:6]):
        raise ValueError("stem: pixels and their normalisation get no gradient here; use stem_reference for theirs")
    if any(ctx.needs_input_grad[1:4]):
        dweight, dscale, dshift = stem_gradients(dy, *inputs)
        for i, (leaf, grad) in enumerate(((weight, dweight), (scale, dscale), (shift, dshift)), 1):
            grads[i] = grad.to(leaf.dtype) if ctx.needs_input_grad[i] else None
    return tuple(grads)


stem.register_autograd(_differentiate, setup_context=_save)
