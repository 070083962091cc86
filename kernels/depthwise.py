"""Fused depthwise convolution, one filter per channel, each op one pass over memory:

    y   = act(z),   z = conv(x, w) * scale + shift + residual
    dx  = (conv_transpose(dz, w) + addend) * slope(mask),   dz = dy * slope(gate)
    dw[c, r, s] += sum of dz * x over the pixels that tap (r, s) joins,   dshift[c] += sum of dz over all pixels

    conv(x, w)[n, c, i, j] = sum over r, s of  x[n, c, h, w] * w[c, r, s]
                             at h = i*stride - top + r*dilation, w = j*stride - left + s*dilation

There are no channels to sum over, so tensor cores are of no use and memory sets the time, provided that a value is not
loaded and widened anew for each tap. A program makes TH rows of output, a vector of channels in each thread: for one
filter column it loads every row of input once and adds it to all rows of output that it concerns. Filter columns read
the same values again, from the first-level cache.

The data gradient is the same kernel: a correlation of dz with turned weights, on a grid where dz lies `stride` apart
("up"), as the forward's outputs lie `stride` apart on its input ("down").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, activate_reference, slope, slope_reference
from .dtypes import accumulator
from .tuning import interpreting, power_of_two
from .windows import empty_map, nhwc, output_size, spatial_strides


@triton.jit
def _whole(n, VEC: tl.constexpr):
    """`n`, a multiple of VEC, in a form that tells the compiler so: else it would not load VEC channels at once."""
    return n // VEC * VEC


@triton.jit
def _spread(sums, x, factors, at: tl.constexpr, APART: tl.constexpr, FACTORS_APART: tl.constexpr):
    """sums[a] += x * factors[b] wherever a * APART + b * FACTORS_APART == at.

    Forward and data gradient spread a row of input over rows of output, factors being filter rows; the weight gradient
    spreads it over filter rows, factors being rows of dz.
    """
    for a in tl.static_range(len(sums)):
        for b in tl.static_range(len(factors)):
            if a * APART + b * FACTORS_APART == at:
                sums = sums[:a] + (sums[a] + x * factors[b],) + sums[a + 1 :]  # noqa: RUF005  (Triton knows no *)
    return sums


@triton.jit
def _depthwise_kernel(
    x_ptr,
    g_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    mask_ptr,
    y_ptr,
    z_ptr,  # w is [R*S, C]
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,  # strides of image, row, pixel; channels have stride 1
    g_sn: tl.int64,
    g_sh: tl.int64,
    g_sw: tl.int64,
    r_sn: tl.int64,
    r_sh: tl.int64,
    r_sw: tl.int64,
    m_sn: tl.int64,
    m_sh: tl.int64,
    m_sw: tl.int64,
    y_sn: tl.int64,
    y_sh: tl.int64,
    y_sw: tl.int64,
    z_sn: tl.int64,
    z_sh: tl.int64,
    z_sw: tl.int64,
    H,
    W,
    OH,
    OW,
    C,
    lines,
    segments,  # tiles of TH rows in an image, of BW * UP_W columns in a row
    lead_h,
    lead_w,  # the first tile begins at output (-lead_h, -lead_w), so that ...
    base_h,
    base_w,  # ... its first tap falls on a value of the input, (-base_h, -base_w)
    R: tl.constexpr,
    S: tl.constexpr,
    RB: tl.constexpr,  # filter rows, filter columns, filter rows held at once
    DOWN_H: tl.constexpr,
    DOWN_W: tl.constexpr,
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    S_STEP: tl.constexpr,
    TURNED: tl.constexpr,
    TH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    VEC: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_Z: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
):
    # Channels first, then the phases of one segment, then along the row: neighbours in time read the same lines.
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BC)
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    phase = pid // blocks % UP_W
    p = pid // blocks // UP_W % segments * BW + tl.arange(0, BW)[:, None]  # [BW, 1]
    line = pid // blocks // UP_W // segments % lines
    n = (pid // blocks // UP_W // segments // lines).to(tl.int64)
    wanted = c < _whole(C, VEC)
    # Taps are loaded in the layout in which they are used; a [1, BC] load would be exchanged through shared memory.
    w_tap = w_ptr + tl.broadcast_to(c, (BW, BC))
    x_line = x_ptr + n * _whole(x_sn, VEC) + c
    g_line = g_ptr + n * _whole(g_sn, VEC) + c if GATE != "none" else None

    # A phase of columns meets every S_STEP-th filter column, beginning with `first`; with gaps, perhaps none.
    first = 0
    if UP_W > 1:
        first = S
        for k in tl.static_range(UP_W - 1, -1, -1):
            first = tl.where((phase + k * DIL_W) % UP_W == 0, k, first)

    accs = (tl.zeros((BW, BC), ACC),) * TH
    for r0 in range(0, R, RB):
        for s in range(first, S, S_STEP):
            taps = ()
            for r in tl.static_range(RB):
                tap = (r0 + r) * S + s
                tap = R * S - 1 - tap if TURNED else tap
                keep = wanted & (r0 + r < R)
                taps += (tl.load(w_tap + tap * _whole(C, VEC), mask=keep, other=0.0).to(ACC),)
            w = p * DOWN_W - base_w + (phase + s * DIL_W) // UP_W
            inside = (w >= 0) & (w < W) & wanted
            x_column = x_line + w.to(tl.int64) * _whole(x_sw, VEC)
            g_column = g_line + w.to(tl.int64) * _whole(g_sw, VEC) if GATE != "none" else None
            for v in tl.static_range(((TH - 1) * DOWN_H + (RB - 1) * DIL_H) // UP_H + 1):
                h = line * (TH * DOWN_H // UP_H) - base_h + r0 * DIL_H // UP_H + v
                hit = inside & (h >= 0) & (h < H)
                x = tl.load(x_column + h.to(tl.int64) * _whole(x_sh, VEC), mask=hit, other=0.0).to(ACC)
                if GATE != "none":
                    g = tl.load(g_column + h.to(tl.int64) * _whole(g_sh, VEC), mask=hit, other=0.0)
                    x *= slope(g.to(ACC), GATE)
                accs = _spread(accs, x, taps, v * UP_H, DOWN_H, DIL_H)

    j = p * UP_W + phase - lead_w
    inside = (j >= 0) & (j < OW) & wanted
    j = j.to(tl.int64)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + c, mask=wanted, other=0.0).to(ACC)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + c, mask=wanted, other=0.0).to(ACC)
    for a in tl.static_range(TH):
        i = (line * TH + a - lead_h).to(tl.int64)
        keep = inside & (i >= 0) & (i < OH)
        z = accs[a]
        if HAS_SCALE:
            z *= scale
        if HAS_SHIFT:
            z += shift
        if HAS_RESIDUAL:
            at = n * _whole(r_sn, VEC) + i * _whole(r_sh, VEC) + j * _whole(r_sw, VEC) + c
            z += tl.load(residual_ptr + at, mask=keep, other=0.0).to(ACC)
        if HAS_Z:
            at = n * _whole(z_sn, VEC) + i * _whole(z_sh, VEC) + j * _whole(z_sw, VEC) + c
            tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=keep)
        y = activate(z, ACT)
        if MASK != "none":
            at = n * _whole(m_sn, VEC) + i * _whole(m_sh, VEC) + j * _whole(m_sw, VEC) + c
            y *= slope(tl.load(mask_ptr + at, mask=keep, other=0.0).to(ACC), MASK)
        at = n * _whole(y_sn, VEC) + i * _whole(y_sh, VEC) + j * _whole(y_sw, VEC) + c
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _depthwise_wgrad_kernel(
    x_ptr,
    dy_ptr,
    g_ptr,
    part_ptr,  # part is [splits, R*S + 1, C], last the sum of dz
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,
    d_sn: tl.int64,
    d_sh: tl.int64,
    d_sw: tl.int64,
    g_sn: tl.int64,
    g_sh: tl.int64,
    g_sw: tl.int64,
    H,
    W,
    OH,
    OW,
    C,
    lines,
    segments,  # tiles of TH rows in an image, of BW columns in a row
    tiles,
    share,  # all tiles, and how many of them one split sums
    top,
    left,
    R: tl.constexpr,
    S: tl.constexpr,
    RB: tl.constexpr,
    SB: tl.constexpr,  # the filter, and the part of it held at once
    DOWN_H: tl.constexpr,
    DOWN_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    TH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    VEC: tl.constexpr,
    GATE: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    split = tl.program_id(1)
    blocks = tl.cdiv(C, BC)
    across = (S + SB - 1) // SB
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    r0, s0 = pid // blocks // across * RB, pid // blocks % across * SB
    wanted = c < _whole(C, VEC)

    sums = (tl.zeros((BW, BC), ACC),) * (RB * SB)  # by filter column, then by filter row
    total = tl.zeros((BW, BC), ACC)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        j = tile % segments * BW + tl.arange(0, BW)[:, None]  # [BW, 1]
        i0 = tile // segments % lines * TH
        n = (tile // segments // lines).to(tl.int64)
        d_column = dy_ptr + n * _whole(d_sn, VEC) + j.to(tl.int64) * _whole(d_sw, VEC) + c
        g_column = g_ptr + n * _whole(g_sn, VEC) + j.to(tl.int64) * _whole(g_sw, VEC) + c if GATE != "none" else None
        dzs = ()
        for a in tl.static_range(TH):
            i = (i0 + a).to(tl.int64)
            keep = (j < OW) & wanted & (i < OH)
            dz = tl.load(d_column + i * _whole(d_sh, VEC), mask=keep, other=0.0).to(ACC)
            if GATE != "none":
                dz *= slope(tl.load(g_column + i * _whole(g_sh, VEC), mask=keep, other=0.0).to(ACC), GATE)
            total += dz
            dzs += (dz,)
        for s in tl.static_range(SB):
            w = j * DOWN_W - left + (s0 + s) * DIL_W
            inside = (w >= 0) & (w < W) & wanted
            filter_column = sums[s * RB : (s + 1) * RB]
            x_column = x_ptr + n * _whole(x_sn, VEC) + w.to(tl.int64) * _whole(x_sw, VEC) + c
            for v in tl.static_range((TH - 1) * DOWN_H + (RB - 1) * DIL_H + 1):
                h = i0 * DOWN_H - top + r0 * DIL_H + v
                hit = inside & (h >= 0) & (h < H)
                x = tl.load(x_column + h.to(tl.int64) * _whole(x_sh, VEC), mask=hit, other=0.0).to(ACC)
                filter_column = _spread(filter_column, x, dzs, v, DIL_H, DOWN_H)
            sums = sums[: s * RB] + filter_column + sums[(s + 1) * RB :]

    part = part_ptr + split.to(tl.int64) * ((R * S + 1) * C) + c  # [1, BC]
    for r in tl.static_range(RB):
        for s in tl.static_range(SB):
            keep = wanted & (r0 + r < R) & (s0 + s < S)
            value = tl.sum(sums[s * RB + r], axis=0, keep_dims=True)
            tl.store(part + ((r0 + r) * S + s0 + s) * C, value, mask=keep)
    if (r0 == 0) & (s0 == 0):
        tl.store(part + R * S * C, tl.sum(total, axis=0, keep_dims=True), mask=wanted)


@dataclass(frozen=True)
class Tile:
    """What a program works on at a time: rows, pixels of a row, channels; and with how many warps."""

    rows: int
    pixels: int
    channels: int
    num_warps: int = 4


# Rows of output that a program makes at once: with more, registers leave too few programs on a multiprocessor.
_ROWS = 4
# Filter rows that a program holds at most, and taps that one of the weight gradient holds: Triton's compile time grows
# faster than their number.
_FILTER_ROWS, _TAPS = 7, 28
# Sums that a thread of the weight gradient keeps in registers.
_SUMS = 56
# Programs of the weight gradient: several for each multiprocessor of the largest chip.
_PROGRAMS = 1024


def _tile(dtype: torch.dtype, channels: int, rows: int, pixels: int, vector: int) -> Tile:
    """The tile of a map of `rows` rows of `pixels` pixels, `vector` channels in a thread."""
    rows = power_of_two(rows, 1, _ROWS)
    if interpreting():  # few large programs: a call costs more than its elements
        return Tile(rows, power_of_two(pixels, 1, 256), power_of_two(channels, 1, 128))
    # A line of 128 bytes, or half of one where that leaves fewer lanes idle.
    line = 128 // dtype.itemsize
    whole, half = (triton.cdiv(channels, n) * n for n in (line, line // 2))
    block = power_of_two(channels, vector, line if whole <= half else line // 2)
    run = power_of_two(pixels, max(1, 32 * vector // block), 128 * vector // block)
    return Tile(rows, run, block, run * block // (32 * vector))


def forward_tile(dtype: torch.dtype, channels: int, rows: int, pixels: int) -> Tile:
    """The tile of the forward and the data gradient; `pixels` of one phase."""
    return _tile(dtype, channels, rows, pixels, 16 // dtype.itemsize)


def wgrad_tile(dtype: torch.dtype, channels: int, rows: int, pixels: int, taps: int) -> Tile:
    """The tile of the weight gradient: as many channels in a thread as its sums leave room for."""
    vector = 16 // dtype.itemsize
    while vector > 1 and vector * taps > _SUMS:
        vector //= 2
    return _tile(dtype, channels, rows, pixels, vector)


def _part(size: int, most: int) -> int:
    """The length of equal parts, as few as possible, none longer than `most`."""
    return triton.cdiv(size, triton.cdiv(size, most))


def _vector(channels: int, maps: Sequence[Tensor | None]) -> int:
    """Channels that always begin at a multiple of 16 bytes, or as near as strides and channels allow."""
    strides = [s for x in maps if x is not None for s in spatial_strides(x)]
    widest = max(16 // x.element_size() for x in maps if x is not None)
    return math.gcd(channels, *strides, widest)


def _check_filter(name: str, weight: Tensor, channels: int) -> None:
    if weight.shape[:2] != (channels, 1):
        raise ValueError(
            f"{name}: weights of shape {tuple(weight.shape)} for {channels} channels; expected ({channels}, 1, R, S)"
        )


def _launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    down: Sequence[int],
    up: Sequence[int],
    top: int,
    left: int,
    dilation: Sequence[int],
    turned: bool,
    act: str,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    z: Tensor | None,
    gate: Tensor | None,
    gate_act: str,
    mask: Tensor | None,
    mask_act: str,
) -> None:
    n, channels, h, w = x.shape
    _, _, oh, ow = y.shape
    _, _, r, s = weight.shape
    if not y.numel():
        return
    # The first tile begins where its first tap falls on a value of the raised grid.
    lead_h, lead_w = -top % up[0], -left % up[1]
    tile = forward_tile(x.dtype, channels, oh + lead_h, triton.cdiv(ow + lead_w, up[1]))
    rows = triton.cdiv(tile.rows, up[0]) * up[0]
    held = r if r <= _FILTER_ROWS else triton.cdiv(_part(r, _FILTER_ROWS), up[0]) * up[0]
    lines, segments = triton.cdiv(oh + lead_h, rows), triton.cdiv(ow + lead_w, tile.pixels * up[1])
    programs = triton.cdiv(channels, tile.channels) * up[1] * segments * lines * n
    if programs >= 2**31:
        raise ValueError(f"depthwise: an output of {n} x {oh} x {ow} pixels is too large; use smaller tiles")
    strides = [spatial_strides(y if t is None else t) for t in (x, gate, residual, mask, y, z)]
    _depthwise_kernel[(programs,)](
        x,
        gate,
        weight.reshape(channels, r * s).t().contiguous(),
        scale,
        shift,
        residual,
        mask,
        y,
        z,
        *[v for triple in strides for v in triple],
        h,
        w,
        oh,
        ow,
        channels,
        lines,
        segments,
        lead_h,
        lead_w,
        (lead_h + top) // up[0],
        (lead_w + left) // up[1],
        R=r,
        S=s,
        RB=held,
        DOWN_H=down[0],
        DOWN_W=down[1],
        UP_H=up[0],
        UP_W=up[1],
        DIL_H=dilation[0],
        DIL_W=dilation[1],
        S_STEP=up[1] // math.gcd(up[1], dilation[1]),
        TURNED=turned,
        TH=rows,
        BW=tile.pixels,
        BC=tile.channels,
        VEC=_vector(channels, (x, y, residual, z, gate, mask)),
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_Z=z is not None,
        ACT=act,
        GATE=gate_act,
        MASK=mask_act,
        ACC=accumulator(x.dtype),
        num_warps=tile.num_warps,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str = "none",
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    z: Tensor | None = None,
) -> None:
    """Write y, and z if given (what the activation is applied to).

    Args:
        x: (N, C, H, W) window.
        weight: (C, 1, R, S).
        y: (N, C, OH, OW) window to be written.
        padding: (top, bottom, left, right) rows and columns of zeros around x.
        scale, shift: (C,).
        residual, z: windows of y's size.
    """
    _check_filter("depthwise_forward", weight, x.shape[1])
    _launch(
        x,
        weight,
        y,
        stride,
        (1, 1),
        padding[0],
        padding[2],
        dilation,
        False,
        act,
        scale,
        shift,
        residual,
        z,
        None,
        "none",
        None,
        "none",
    )


def dgrad(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    gate: Tensor | None = None,
    gate_act: str = "none",
    addend: Tensor | None = None,
    mask: Tensor | None = None,
    mask_act: str = "none",
) -> None:
    """Write dx.

    Args:
        dy: (N, C, OH, OW) window, the gradient of y.
        weight: (C, 1, R, S), times the scale if there is one.
        dx: (N, C, H, W) window to be written.
        padding: of x, as in the forward.
        gate: window of dy's size, y or z of the op itself. `gate_act` says whose slope it gives.
        addend: window of dx's size, the gradient that comes along another branch.
        mask: window of dx's size, y or z of the activation that made x. `mask_act` says whose slope it gives.
    """
    _check_filter("depthwise_dgrad", weight, dy.shape[1])
    top, left = (dilation[i] * (weight.shape[2 + i] - 1) - padding[2 * i] for i in (0, 1))
    _launch(
        dy,
        weight,
        dx,
        (1, 1),
        stride,
        top,
        left,
        dilation,
        True,
        "none",
        None,
        None,
        addend,
        None,
        gate,
        gate_act,
        mask,
        mask_act,
    )


def wgrad(
    x: Tensor,
    dy: Tensor,
    dw: Tensor,
    dshift: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    gate: Tensor | None = None,
    gate_act: str = "none",
) -> None:
    """Add to dw and dshift. Two runs agree bit by bit: each split sums its tiles in order, then the splits are summed.

    With a scale, dw is that of w * scale, and the scale's own gradient is the sum of dw * w over the taps.

    Args:
        x: (N, C, H, W) window.
        dy: (N, C, OH, OW) window, the gradient of y.
        dw: (C, 1, R, S), float32 (float64 for float64 maps).
        dshift: (C,), likewise.
        gate: window of dy's size, y or z of the op itself. `gate_act` says whose slope it gives.
    """
    _check_filter("depthwise_wgrad_", dw, x.shape[1])
    n, channels, h, w = x.shape
    _, _, oh, ow = dy.shape
    _, _, r, s = dw.shape
    if not dy.numel():
        return
    rows = _part(r, _FILTER_ROWS)
    columns = _part(s, _TAPS // rows)
    tile = wgrad_tile(x.dtype, channels, oh, ow, rows * columns)
    lines, segments = triton.cdiv(oh, tile.rows), triton.cdiv(ow, tile.pixels)
    tiles = n * lines * segments
    programs = triton.cdiv(channels, tile.channels) * triton.cdiv(r, rows) * triton.cdiv(s, columns)
    splits = min(triton.cdiv(2 if interpreting() else _PROGRAMS, programs), tiles)
    share = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, share)
    part = torch.empty(splits, r * s + 1, channels, dtype=dw.dtype, device=x.device)
    strides = [spatial_strides(dy if t is None else t) for t in (x, dy, gate)]
    _depthwise_wgrad_kernel[(programs, splits)](
        x,
        dy,
        gate,
        part,
        *[v for triple in strides for v in triple],
        h,
        w,
        oh,
        ow,
        channels,
        lines,
        segments,
        tiles,
        share,
        padding[0],
        padding[2],
        R=r,
        S=s,
        RB=rows,
        SB=columns,
        DOWN_H=stride[0],
        DOWN_W=stride[1],
        DIL_H=dilation[0],
        DIL_W=dilation[1],
        TH=tile.rows,
        BW=tile.pixels,
        BC=tile.channels,
        VEC=_vector(channels, (x, dy, gate)),
        GATE=gate_act,
        ACC=accumulator(x.dtype),
        num_warps=tile.num_warps,
    )
    total = part.sum(0)
    dw.view(channels, r * s).add_(total[:-1].t())
    dshift.add_(total[-1])


def depthwise_forward_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
) -> tuple[Tensor, Tensor]:
    """y and z in plain PyTorch."""
    top, bottom, left, right = padding
    z = F.conv2d(F.pad(x, [left, right, top, bottom]), weight, None, tuple(stride), 0, tuple(dilation), x.shape[1])
    if scale is not None:
        z = z * scale.reshape(-1, 1, 1)
    if shift is not None:
        z = z + shift.reshape(-1, 1, 1)
    if residual is not None:
        z = z + residual
    return activate_reference(z, act), z


def depthwise_backward_reference(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_act: str,
    addend: Tensor | None,
    mask: Tensor | None,
    mask_act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw and dshift in plain PyTorch."""
    dz = dy if gate is None else dy * slope_reference(gate, gate_act)
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        _, z = depthwise_forward_reference(x, weight, None, None, None, stride, padding, dilation, "none")
        dx, dw = torch.autograd.grad(z, (x, weight), dz)
    dx = dx if addend is None else dx + addend
    return dx if mask is None else dx * slope_reference(mask, mask_act), dw, dz.sum((0, 2, 3))


def _maps(*maps: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else nhwc(x) for x in maps]


@torch.library.custom_op("gigamorph::depthwise_forward", mutates_args=())
def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    """y and z (empty unless kept); arguments as in `forward`."""
    y, z = _depthwise_forward_fake(x, weight, scale, shift, residual, stride, padding, dilation, act, keep_z)
    forward(
        nhwc(x),
        weight,
        y,
        stride,
        padding,
        dilation,
        act,
        scale=scale,
        shift=shift,
        residual=_maps(residual)[0],
        z=z if keep_z else None,
    )
    return y, z


@depthwise_forward.register_fake
def _depthwise_forward_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    n, channels, h, w = x.shape
    oh = output_size(h, weight.shape[2], stride[0], dilation[0], padding[0], padding[1])
    ow = output_size(w, weight.shape[3], stride[1], dilation[1], padding[2], padding[3])
    y = empty_map(n, channels, oh, ow, x)
    return y, torch.empty_like(y) if keep_z else x.new_empty(0)


@torch.library.custom_op("gigamorph::depthwise_dgrad", mutates_args=())
def depthwise_dgrad(
    dy: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_act: str,
    addend: Tensor | None,
    mask: Tensor | None,
    mask_act: str,
    height: int,
    width: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """dx, of `height` x `width` pixels; other arguments as in `dgrad`."""
    dx = empty_map(dy.shape[0], dy.shape[1], height, width, dy)
    gate, addend, mask = _maps(gate, addend, mask)
    dgrad(
        nhwc(dy),
        weight,
        dx,
        stride,
        padding,
        dilation,
        gate=gate,
        gate_act=gate_act,
        addend=addend,
        mask=mask,
        mask_act=mask_act,
    )
    return dx


@depthwise_dgrad.register_fake
def _depthwise_dgrad_fake(
    dy: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_act: str,
    addend: Tensor | None,
    mask: Tensor | None,
    mask_act: str,
    height: int,
    width: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return empty_map(dy.shape[0], dy.shape[1], height, width, dy)


@torch.library.custom_op("gigamorph::depthwise_wgrad_", mutates_args=("dw", "dshift"))
def depthwise_wgrad_(
    x: Tensor,
    dy: Tensor,
    gate: Tensor | None,
    gate_act: str,
    dw: Tensor,
    dshift: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Add to dw and dshift; arguments as in `wgrad`."""
    wgrad(nhwc(x), nhwc(dy), dw, dshift, stride, padding, dilation, gate=_maps(gate)[0], gate_act=gate_act)


@depthwise_wgrad_.register_fake
def _depthwise_wgrad_fake(
    x: Tensor,
    dy: Tensor,
    gate: Tensor | None,
    gate_act: str,
    dw: Tensor,
    dshift: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    return None
