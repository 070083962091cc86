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

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, activate_reference, slope, slope_reference
from .choice import run_fastest
from .dtypes import accumulator, dot_precision, sum_dtype
from .tuning import interpreting, power_of_two
from .windows import empty_map, nhwc, output_size, spatial_strides

ACTIVATIONS = ("none", "relu", "relu6")  # those that never decrease


@triton.jit
def _patches(
    x_ptr,
    gain_ptr,
    offset_ptr,
    x_sc,
    x_sh,
    x_sw,
    H,
    W,
    low,
    high,
    row,
    columns,
    d,
    dtype: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    CLAMPED: tl.constexpr,
    ACC: tl.constexpr,
):
    """[BM, BK] normalised pixels under taps d = (r * S + s) * C + c of filters that begin at `row` and `columns`."""
    c, s, r = d % C, d // C % S, d // (C * S)
    h = row + r  # [BK]
    w = columns[:, None] + s[None, :]  # [BM, BK]
    hit = ((h >= 0) & (h < H) & (r < R))[None, :] & (w >= 0) & (w < W)
    taps = h.to(tl.int64) * x_sh + s.to(tl.int64) * x_sw + c.to(tl.int64) * x_sc
    v = tl.load(x_ptr + (columns.to(tl.int64) * x_sw)[:, None] + taps[None, :], mask=hit, other=0).to(ACC)
    if HAS_GAIN:
        v = v * tl.load(gain_ptr + c).to(ACC)[None, :] + tl.load(offset_ptr + c).to(ACC)[None, :]
    if CLAMPED:
        v = tl.minimum(tl.maximum(v, low), high)
    if HAS_GAIN or CLAMPED:
        v = tl.where(hit, v, 0.0)
    return v.to(dtype)


@triton.jit
def _conv(
    x_ptr,
    w_ptr,
    scale_ptr,
    gain_ptr,
    offset_ptr,
    x_sc,
    x_sh,
    x_sw,
    H,
    W,
    OH,
    OW,
    K,
    depth,
    w_sd,
    low,
    high,
    ci,
    cj,
    k,
    top,
    left,
    stride_h,
    stride_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    CLAMPED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """[BM, BN] conv(v, w) * scale at conv line ci, columns cj; minus infinity where there is no such output."""
    acc = tl.zeros((BM, BN), ACC)
    for b in range(tl.cdiv(depth, BK)):
        d = b * BK + tl.arange(0, BK)
        a = _patches(
            x_ptr,
            gain_ptr,
            offset_ptr,
            x_sc,
            x_sh,
            x_sw,
            H,
            W,
            low,
            high,
            ci * stride_h - top,
            cj * stride_w - left,
            d,
            w_ptr.dtype.element_ty,
            C,
            R,
            S,
            HAS_GAIN,
            CLAMPED,
            ACC,
        )
        w = tl.load(w_ptr + d[:, None] * w_sd + k[None, :])
        acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=ACC)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]
    return tl.where(((ci >= 0) & (ci < OH) & (cj >= 0) & (cj < OW))[:, None], acc, float("-inf"))


@triton.jit
def _shifted(z, shift_ptr, k, K, HAS_SHIFT: tl.constexpr, ACC: tl.constexpr):
    if HAS_SHIFT:
        z += tl.load(shift_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]
    return z


@triton.jit
def _store_row(
    y_ptr, shift_ptr, y_sh, y_sw, i, j, k, PW, K, z, HAS_SHIFT: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr
):
    y = activate(_shifted(z, shift_ptr, k, K, HAS_SHIFT, ACC), ACT)
    pixels = i.to(tl.int64) * y_sh + j.to(tl.int64) * y_sw
    keep = (j < PW)[:, None] & (k < K)[None, :]
    tl.store(y_ptr + pixels[:, None] + k[None, :], y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _stem_forward_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    gain_ptr,
    offset_ptr,
    y_ptr,
    x_sn: tl.int64,
    x_sc: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,  # strides of image, channel, row, pixel
    y_sn: tl.int64,
    y_sh: tl.int64,
    y_sw: tl.int64,
    H,
    W,
    OH,
    OW,
    PH,
    PW,
    K,  # pixels, conv outputs, pixels of y, filters
    depth,
    w_sd,  # taps x channels; filters, padded
    low,
    high,
    top,
    left,
    stride_h,
    stride_w,
    pool_top,
    pool_left,
    lines,
    strips,
    segments,  # rows of y per program, programs per image and per row
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    CLAMPED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    POOL: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BN)
    k = (pid % blocks) * BN + tl.arange(0, BN)
    j = (pid // blocks % segments) * BM + tl.arange(0, BM)
    i = pid // blocks // segments % strips * lines
    n = (pid // blocks // segments // strips).to(tl.int64)
    x_ptr += n * x_sn
    rows = min(lines, PH - i)
    y_ptr += n * y_sn

    if POOL:
        best = tl.full((BM, BN), float("-inf"), ACC)
        # Conv lines 2i, 2i + 1 and 2i + 2 make row i of y, and the last of them is also the first of row i + 1.
        for t in range(2 * rows + 1):
            line = tl.full((BM, BN), float("-inf"), ACC)
            for dj in range(3):
                z = _conv(
                    x_ptr,
                    w_ptr,
                    scale_ptr,
                    gain_ptr,
                    offset_ptr,
                    x_sc,
                    x_sh,
                    x_sw,
                    H,
                    W,
                    OH,
                    OW,
                    K,
                    depth,
                    w_sd,
                    low,
                    high,
                    2 * i - pool_top + t,
                    2 * j - pool_left + dj,
                    k,
                    top,
                    left,
                    stride_h,
                    stride_w,
                    C,
                    R,
                    S,
                    BM,
                    BN,
                    BK,
                    HAS_GAIN,
                    CLAMPED,
                    HAS_SCALE,
                    PRECISION,
                    ACC,
                )
                line = tl.maximum(line, z)
            best = tl.maximum(best, line)
            if t % 2 == 0:
                if t > 0:
                    _store_row(y_ptr, shift_ptr, y_sh, y_sw, i + t // 2 - 1, j, k, PW, K, best, HAS_SHIFT, ACT, ACC)
                best = line
    else:
        for t in range(rows):
            z = _conv(
                x_ptr,
                w_ptr,
                scale_ptr,
                gain_ptr,
                offset_ptr,
                x_sc,
                x_sh,
                x_sw,
                H,
                W,
                OH,
                OW,
                K,
                depth,
                w_sd,
                low,
                high,
                i + t,
                j,
                k,
                top,
                left,
                stride_h,
                stride_w,
                C,
                R,
                S,
                BM,
                BN,
                BK,
                HAS_GAIN,
                CLAMPED,
                HAS_SCALE,
                PRECISION,
                ACC,
            )
            _store_row(y_ptr, shift_ptr, y_sh, y_sw, i + t, j, k, PW, K, z, HAS_SHIFT, ACT, ACC)


@triton.jit
def _stem_backward_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    gain_ptr,
    offset_ptr,
    dy_ptr,
    g_ptr,
    s_ptr,  # [splits, K, depth] and [splits, K]: partial sums of g^T patches and of g
    x_sn: tl.int64,
    x_sc: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,  # strides of image, channel, row, pixel
    dy_sn: tl.int64,
    dy_sh: tl.int64,
    dy_sw: tl.int64,
    H,
    W,
    OH,
    OW,
    PH,
    PW,
    K,  # pixels, conv outputs, pixels of y, filters
    depth,
    w_sd,  # taps x channels; filters, padded
    low,
    high,
    top,
    left,
    stride_h,
    stride_w,
    pool_top,
    pool_left,
    tiles,
    share,
    segments,  # row segments of y in all, per program and per row
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    CLAMPED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    POOL: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    SPOTS: tl.constexpr = 9 if POOL else 1  # conv outputs that one pixel of y chooses from
    STEP: tl.constexpr = 2 if POOL else 1
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BN)
    k = (pid % blocks) * BN + tl.arange(0, BN)
    split = pid // blocks

    sums = tl.zeros((BN,), ACC)
    first = split * share
    row = split.to(tl.int64) * K + k  # [BN] rows of partial sums
    for tile in range(first, min(first + share, tiles)):
        j = (tile % segments) * BM + tl.arange(0, BM)
        i = tile // segments % PH
        n = (tile // segments // PH).to(tl.int64)
        image = x_ptr + n * x_sn
        ci, cj = STEP * i - pool_top, STEP * j - pool_left
        pixels = n * dy_sn + i.to(tl.int64) * dy_sh + j.to(tl.int64) * dy_sw
        keep = (j < PW)[:, None] & (k < K)[None, :]
        g = tl.load(dy_ptr + pixels[:, None] + k[None, :], mask=keep, other=0.0).to(ACC)

        spot = tl.zeros((BM, BN), tl.int32)
        if POOL or ACT != "none":
            best = tl.full((BM, BN), float("-inf"), ACC)
            for o in range(SPOTS):
                z = _conv(
                    image,
                    w_ptr,
                    scale_ptr,
                    gain_ptr,
                    offset_ptr,
                    x_sc,
                    x_sh,
                    x_sw,
                    H,
                    W,
                    OH,
                    OW,
                    K,
                    depth,
                    w_sd,
                    low,
                    high,
                    ci + o // 3,
                    cj + o % 3,
                    k,
                    top,
                    left,
                    stride_h,
                    stride_w,
                    C,
                    R,
                    S,
                    BM,
                    BN,
                    BK,
                    HAS_GAIN,
                    CLAMPED,
                    HAS_SCALE,
                    PRECISION,
                    ACC,
                )
                spot = tl.where(z > best, o, spot)  # an equal value later does not displace the first
                best = tl.maximum(best, z)
            if ACT != "none":
                g *= slope(_shifted(best, shift_ptr, k, K, HAS_SHIFT, ACC), ACT)
        sums += tl.sum(g, 0)

        # The products wait in memory (in L2, in fact) between tiles: with those of 147 taps registers would run out.
        for b in range(tl.cdiv(depth, BK)):
            d = b * BK + tl.arange(0, BK)
            at = row[:, None] * depth + d[None, :]
            owned = (k < K)[:, None] & (d < depth)[None, :]
            products = tl.load(g_ptr + at, mask=owned & (tile > first), other=0.0)
            for o in range(SPOTS):
                here = tl.where(spot == o, g, 0.0).to(w_ptr.dtype.element_ty)
                v = _patches(
                    image,
                    gain_ptr,
                    offset_ptr,
                    x_sc,
                    x_sh,
                    x_sw,
                    H,
                    W,
                    low,
                    high,
                    (ci + o // 3) * stride_h - top,
                    (cj + o % 3) * stride_w - left,
                    d,
                    w_ptr.dtype.element_ty,
                    C,
                    R,
                    S,
                    HAS_GAIN,
                    CLAMPED,
                    ACC,
                )
                products = tl.dot(here.T, v, products, input_precision=PRECISION, out_dtype=ACC)
            tl.store(g_ptr + at, products, mask=owned)

    tl.store(s_ptr + row, sums, mask=k < K)


def stem_size(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], pool_padding: Sequence[int] | None
) -> tuple[int, int, int, int]:
    """Rows and columns of conv outputs, and of y."""
    top, bottom, left, right = padding
    oh = output_size(x.shape[2], weight.shape[2], stride[0], 1, top, bottom)
    ow = output_size(x.shape[3], weight.shape[3], stride[1], 1, left, right)
    if pool_padding is None:
        return oh, ow, oh, ow
    top, bottom, left, right = pool_padding
    return oh, ow, output_size(oh, 3, 2, 1, top, bottom), output_size(ow, 3, 2, 1, left, right)


def _checked(
    x: Tensor,
    weight: Tensor,
    act: str,
    gain: Tensor | None,
    offset: Tensor | None,
    padding: Sequence[int],
    pool_padding: Sequence[int] | None,
) -> Tensor:
    """The image as kernels read it; ValueError for what they cannot do."""
    if act not in ACTIVATIONS:
        raise ValueError(
            f"stem: activation {act!r} may decrease, so it cannot follow the pooling; use one of {ACTIVATIONS}"
        )
    if (gain is None) != (offset is None):
        raise ValueError("stem: gain without offset, or offset without gain; give both or neither")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"stem: {x.shape[1]} channels of pixels, filters for {weight.shape[1]}; give as many")
    if min(padding) < 0 or (pool_padding is not None and not 0 <= min(pool_padding) <= max(pool_padding) <= 1):
        raise ValueError(f"stem: padding {padding}, pool_padding {pool_padding}; give sizes, for the pooling 0 or 1")
    return x.view(torch.uint16) if x.dtype == torch.int16 else x  # PyTorch's older name for the same bits


def _options(
    x: Tensor,
    weight: Tensor,
    act: str,
    gain: Tensor | None,
    low: float,
    high: float,
    scale: Tensor | None,
    shift: Tensor | None,
    pooled: bool,
) -> dict[str, object]:
    return {
        "C": x.shape[1],
        "R": weight.shape[2],
        "S": weight.shape[3],
        "HAS_GAIN": gain is not None,
        "CLAMPED": low > -math.inf or high < math.inf,
        "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None,
        "POOL": pooled,
        "ACT": act,
        "PRECISION": dot_precision(weight.dtype),
        "ACC": accumulator(weight.dtype),
    }


def _tile(weight: Tensor, width: int) -> dict[str, int]:
    """Pixels, filters and taps of a tile, as large as maxima, places and sums fit in registers without spilling."""
    filters, depth = weight.shape[0], weight[0].numel()
    if interpreting():  # few large programs: a call costs more than its elements
        return {
            "BM": power_of_two(width, 16, 128),
            "BN": power_of_two(filters, 16, 128),
            "BK": power_of_two(depth, 16, 64),
        }
    side = 64 if weight.dtype.itemsize <= 2 else 32
    blocks = {"BM": side, "BN": power_of_two(filters, 16, side), "BK": power_of_two(depth, 16, 32)}
    # One stage: with more, Triton (3.6, 3.7) may overwrite patches in registers while Hopper still multiplies them
    # (triton-lang/triton#9433). Told no limit, the assembler spills a few registers to fit two programs per processor.
    return {**blocks, "num_warps": 8, "num_stages": 1, "maxnreg": 255}


def _matrix(weight: Tensor) -> Tensor:
    """[taps x channels, K]"""
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _padded(matrix: Tensor, tile: dict[str, int]) -> Tensor:
    """`matrix` with zeros up to whole tiles, so that it is read in long words and without masks."""
    depth, filters = matrix.shape
    return F.pad(matrix, [0, -filters % tile["BN"], 0, -depth % tile["BK"]]).contiguous()


def stem_forward(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    pool_padding: Sequence[int] | None = None,
) -> None:
    """Write y; see the formula above.

    Args:
        x: (N, C, H, W) pixels with any strides: uint8, uint16 (also as the bits of int16) or floating point.
        weight: (K, C, R, S), in the dtype to compute in.
        y: (N, K, PH, PW) window to be written.
        padding: (top, bottom, left, right) rows and columns of zeros around the normalised pixels.
        scale, shift: (K,).
        gain, offset: (C,) floating point, or neither.
        pool_padding: likewise for the pooling, each 0 or 1; None for no pooling.
    """
    x = _checked(x, weight, act, gain, offset, padding, pool_padding)
    oh, ow, ph, pw = stem_size(x, weight, stride, padding, pool_padding)
    n, filters = x.shape[0], weight.shape[0]
    if y.shape != (n, filters, ph, pw) or (y.stride(1) != 1 and filters > 1):
        raise ValueError(
            f"stem: y is {tuple(y.shape)}, {y.stride()}; give a channels-last map of {(n, filters, ph, pw)}"
        )
    if not y.numel():
        return
    tile = _tile(weight, pw)
    segments, blocks = triton.cdiv(pw, tile["BM"]), triton.cdiv(filters, tile["BN"])
    # Long strips share more conv lines, short ones give every processor work.
    lines = max(1, min(8, n * ph * segments * blocks // 2048)) if not interpreting() else min(ph, 64)
    strips = triton.cdiv(ph, lines)
    matrix = _padded(_matrix(weight), tile)
    pool_top, _, pool_left, _ = pool_padding or (0, 0, 0, 0)
    _stem_forward_kernel[(n * strips * segments * blocks,)](
        x,
        matrix,
        scale,
        shift,
        gain,
        offset,
        y,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        x.stride(3),
        *spatial_strides(y),
        x.shape[2],
        x.shape[3],
        oh,
        ow,
        ph,
        pw,
        filters,
        weight[0].numel(),
        matrix.shape[1],
        float(low),
        float(high),
        padding[0],
        padding[2],
        *stride,
        pool_top,
        pool_left,
        lines,
        strips,
        segments,
        **_options(x, weight, act, gain, low, high, scale, shift, pool_padding is not None),
        **tile,
    )


def stem_backward(
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    dweight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    *,
    dshift: Tensor | None = None,
    dscale: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    pool_padding: Sequence[int] | None = None,
) -> None:
    """Add the gradients of weight, shift and scale to the buffers given.

    Args:
        dy: (N, K, PH, PW) window in the dtype of weight, the gradient of y.
        dweight, dshift, dscale: (K, C, R, S), (K,) and (K,), in float32 (float64 for weights in float64).
        others: as for `stem_forward`.
    """
    x = _checked(x, weight, act, gain, offset, padding, pool_padding)
    oh, ow, ph, pw = stem_size(x, weight, stride, padding, pool_padding)
    n, filters = x.shape[0], weight.shape[0]
    if dy.shape != (n, filters, ph, pw) or (dy.stride(1) != 1 and filters > 1):
        raise ValueError(
            f"stem: dy is {tuple(dy.shape)}, {dy.stride()}; give a channels-last map of {(n, filters, ph, pw)}"
        )
    if not dy.numel():
        return
    tile = _tile(weight, pw)
    segments, blocks = triton.cdiv(pw, tile["BM"]), triton.cdiv(filters, tile["BN"])
    tiles = n * ph * segments
    share = triton.cdiv(tiles, 4 if interpreting() else 1024)  # some 20 MB of partial sums at most
    splits = triton.cdiv(tiles, share)
    matrix = _padded(_matrix(weight), tile)
    sums = torch.empty(splits, filters, weight[0].numel(), dtype=dweight.dtype, device=x.device)
    shifts = torch.empty(splits, filters, dtype=dweight.dtype, device=x.device)
    pool_top, _, pool_left, _ = pool_padding or (0, 0, 0, 0)
    _stem_backward_kernel[(splits * blocks,)](
        x,
        matrix,
        scale,
        shift,
        gain,
        offset,
        dy,
        sums,
        shifts,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        x.stride(3),
        *spatial_strides(dy),
        x.shape[2],
        x.shape[3],
        oh,
        ow,
        ph,
        pw,
        filters,
        weight[0].numel(),
        matrix.shape[1],
        float(low),
        float(high),
        padding[0],
        padding[2],
        *stride,
        pool_top,
        pool_left,
        tiles,
        share,
        segments,
        **_options(x, weight, act, gain, low, high, scale, shift, pool_padding is not None),
        **tile,
    )
    total = sums.sum(0)
    if dshift is not None:
        dshift += shifts.sum(0)
    if dscale is not None:
        dscale += (_matrix(weight).T.to(total.dtype) * total).sum(1)
    if scale is not None:
        total *= scale.to(total.dtype)[:, None]
    k, c, r, s = weight.shape
    dweight += total.reshape(k, r, s, c).permute(0, 3, 1, 2)


def stem_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    low: float,
    high: float,
    stride: Sequence[int],
    padding: Sequence[int],
    pool_padding: Sequence[int] | None,
    act: str,
) -> Tensor:
    """y in plain PyTorch: normalised in float32 or better, the rest in the dtype of weight."""
    z = F.conv2d(_normalised(x, weight, gain, offset, low, high, padding), weight, None, tuple(stride))
    if scale is not None:
        z = z * scale.reshape(-1, 1, 1)
    if shift is not None:
        z = z + shift.reshape(-1, 1, 1)
    y = activate_reference(z, act)
    if pool_padding is None:
        return y
    top, bottom, left, right = pool_padding
    return F.max_pool2d(F.pad(y, [left, right, top, bottom], value=-math.inf), 3, 2)


def _normalised(
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    low: float,
    high: float,
    padding: Sequence[int],
) -> Tensor:
    """The padded window of values that the convolution reads."""
    if x.dtype == torch.int16:
        x = x.view(torch.uint16)
    v = x.to(torch.promote_types(weight.dtype, torch.float32))
    if gain is not None and offset is not None:
        v = v * gain.reshape(-1, 1, 1) + offset.reshape(-1, 1, 1)
    if low > -math.inf or high < math.inf:
        v = v.clamp(low, high)
    top, bottom, left, right = padding
    return F.pad(v.to(weight.dtype), [left, right, top, bottom])


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
    stride: Sequence[int],
    padding: Sequence[int],
    pool_padding: Sequence[int] | None,
    act: str,
) -> Tensor:
    """The fused stem; see `stem_forward`. Differentiable in weight, scale and shift."""
    inputs = x, weight, scale, shift, gain, offset, low, high, stride, padding, pool_padding, act

    def ours() -> Tensor:
        y = _stem_fake(*inputs)
        stem_forward(
            x,
            weight,
            y,
            stride,
            padding,
            act,
            scale=scale,
            shift=shift,
            gain=gain,
            offset=offset,
            low=low,
            high=high,
            pool_padding=pool_padding,
        )
        return y

    return run_fastest("stem", x, _settings(*inputs), ours, lambda: nhwc(stem_reference(*inputs)))


def _settings(x, weight, scale, shift, gain, offset, low, high, stride, padding, pool_padding, act) -> tuple:
    """What the time depends on besides the pixels."""
    given = [
        name for name, t in (("scale", scale), ("shift", shift), ("gain", gain), ("offset", offset)) if t is not None
    ]
    return (tuple(weight.shape), str(weight.dtype), *given, low, high, *stride, *padding, *(pool_padding or ()), act)


@stem.register_fake
def _stem_fake(x, weight, scale, shift, gain, offset, low, high, stride, padding, pool_padding, act) -> Tensor:
    _, _, ph, pw = stem_size(x, weight, stride, padding, pool_padding)
    return empty_map(x.shape[0], weight.shape[0], ph, pw, like=weight)


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
    stride: Sequence[int],
    padding: Sequence[int],
    pool_padding: Sequence[int] | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, scale and shift, in float32 or float64; see `stem_backward`."""
    inputs = x, weight, scale, shift, gain, offset, low, high, stride, padding, pool_padding, act
    dy = dy.contiguous(memory_format=torch.channels_last)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        wide = sum_dtype(weight.dtype)
        dweight, dscale, dshift = (
            torch.zeros(s, dtype=wide, device=x.device) for s in (weight.shape, *2 * [weight.shape[:1]])
        )
        stem_backward(
            x,
            weight,
            dy,
            dweight,
            stride,
            padding,
            act,
            dshift=dshift,
            dscale=dscale,
            scale=scale,
            shift=shift,
            gain=gain,
            offset=offset,
            low=low,
            high=high,
            pool_padding=pool_padding,
        )
        return dweight, dscale, dshift

    return run_fastest("stem_gradients", x, _settings(*inputs), ours, lambda: _gradients_stock(dy, *inputs))


def _gradients_stock(
    dy, x, weight, scale, shift, gain, offset, low, high, stride, padding, pool_padding, act
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with PyTorch's own ops, what they need computed again."""
    wide, aten = sum_dtype(weight.dtype), torch.ops.aten
    v = _normalised(x, weight, gain, offset, low, high, padding)
    z = F.conv2d(v, weight, None, tuple(stride))
    if scale is not None:
        z = z * scale.reshape(-1, 1, 1)
    if shift is not None:
        z = z + shift.reshape(-1, 1, 1)
    y = activate_reference(z, act)
    if pool_padding is not None:
        top, bottom, left, right = pool_padding
        padded = F.pad(y, [left, right, top, bottom], value=-math.inf)
        place = [3, 3], [2, 2], [0, 0], [1, 1], False
        _, indices = aten.max_pool2d_with_indices(padded, *place)
        dy = aten.max_pool2d_with_indices_backward(dy, padded, *place, indices)
        dy = dy[:, :, top : top + y.shape[2], left : left + y.shape[3]]
    dz = dy * slope_reference(y, act)
    dshift = dz.sum((0, 2, 3), dtype=wide)
    dweight = aten.convolution_backward(
        dz, v, weight, None, list(stride), [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1].to(wide)
    dscale = (dweight * weight).sum((1, 2, 3))
    if scale is not None:
        dweight = dweight * scale.to(wide).reshape(-1, 1, 1, 1)
    return dweight, dscale, dshift


@stem_gradients.register_fake
def _stem_gradients_fake(dy, x, weight, *rest) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    dweight, dscale, dshift = (
        torch.empty(s, dtype=wide, device=x.device) for s in (weight.shape, *2 * [weight.shape[:1]])
    )
    return dweight, dscale, dshift


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
