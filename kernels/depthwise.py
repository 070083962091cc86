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
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, slope, slope_reference
from .conv2d_forward import conv2d_forward_reference
from .dtypes import accumulator
from .stream import as_map, place, vector, whole
from .tuning import (
    FILTER_ROWS,
    TAPS,
    depthwise_tile,
    depthwise_wgrad_splits,
    depthwise_wgrad_tile,
    equal_part,
)
from .windows import ConvGeometry


class Sizes(NamedTuple):
    """Rows and columns of input and output, channels; tiles of TH rows in an image and of columns in a row."""

    H: int
    W: int
    OH: int
    OW: int
    C: int
    lines: int
    segments: int


class Filter(NamedTuple):
    """Known when compiled: the filter, and steps from one output and from one tap to the next."""

    R: int
    S: int
    DOWN_H: int
    DOWN_W: int
    DIL_H: int
    DIL_W: int


class Block(NamedTuple):
    """Known when compiled: filter rows and columns held at once; rows, pixels and channels of a tile and a vector."""

    RB: int
    SB: int
    TH: int
    BW: int
    BC: int
    VEC: int
    ACC: tl.dtype


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


@triton.jit(do_not_specialize=["lead_h", "lead_w", "base_h", "base_w"])
def _depthwise_kernel(
    x,  # map [N, C, H, W]
    gate,  # map [N, C, H, W] or None
    residual,  # map [N, C, OH, OW] or None
    mask,  # map [N, C, OH, OW] or None
    y,  # map [N, C, OH, OW]
    z,  # map [N, C, OH, OW] or None
    w_ptr,  # [R*S, C]
    scale_ptr,  # [C] or None
    shift_ptr,  # [C] or None
    size,
    lead_h,
    lead_w,  # the first tile begins at output (-lead_h, -lead_w), so that ...
    base_h,
    base_w,  # ... its first tap falls on a value of the input, (-base_h, -base_w)
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    S_STEP: tl.constexpr,
    TURNED: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    MASK: tl.constexpr,
    F: tl.constexpr,
    B: tl.constexpr,
):
    """y in TH rows, BW columns of one phase of columns, and BC channels."""
    RB: tl.constexpr = B.RB
    TH: tl.constexpr = B.TH
    BW: tl.constexpr = B.BW
    BC: tl.constexpr = B.BC
    # Channels first, then the phases of one segment, then along the row: neighbours in time read the same lines.
    pid = tl.program_id(0)
    C = whole(size.C, B.VEC)
    blocks = tl.cdiv(size.C, BC)
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    phase = pid // blocks % UP_W
    p = pid // blocks // UP_W % size.segments * BW + tl.arange(0, BW)[:, None]  # [BW, 1]
    line = pid // blocks // UP_W // size.segments % size.lines
    n = (pid // blocks // UP_W // size.segments // size.lines).to(tl.int64)
    wanted = c < C
    # Taps are loaded in the layout in which they are used; a [1, BC] load would be exchanged through shared memory.
    w_tap = w_ptr + tl.broadcast_to(c, (BW, BC))
    x_line = x.ptr + n * whole(x.sn, B.VEC) + c
    gate_line = gate.ptr + n * whole(gate.sn, B.VEC) + c if gate.ptr is not None else None

    # A phase of columns meets every S_STEP-th filter column, beginning with `first`; with gaps, perhaps none.
    first = 0
    if UP_W > 1:
        first = F.S
        for k in tl.static_range(UP_W - 1, -1, -1):
            first = tl.where((phase + k * F.DIL_W) % UP_W == 0, k, first)

    accs = (tl.zeros((BW, BC), B.ACC),) * TH
    for r0 in range(0, F.R, RB):
        for s in range(first, F.S, S_STEP):
            taps = ()
            for r in tl.static_range(RB):
                tap = (r0 + r) * F.S + s
                tap = F.R * F.S - 1 - tap if TURNED else tap
                taps += (tl.load(w_tap + tap * C, mask=wanted & (r0 + r < F.R), other=0.0).to(B.ACC),)
            w = p * F.DOWN_W - base_w + (phase + s * F.DIL_W) // UP_W
            inside = (w >= 0) & (w < size.W) & wanted
            x_column = x_line + w.to(tl.int64) * whole(x.sw, B.VEC)
            gate_column = gate_line + w.to(tl.int64) * whole(gate.sw, B.VEC) if gate.ptr is not None else None
            for v in tl.static_range(((TH - 1) * F.DOWN_H + (RB - 1) * F.DIL_H) // UP_H + 1):
                h = line * (TH * F.DOWN_H // UP_H) - base_h + r0 * F.DIL_H // UP_H + v
                hit = inside & (h >= 0) & (h < size.H)
                value = tl.load(x_column + h.to(tl.int64) * whole(x.sh, B.VEC), mask=hit, other=0.0).to(B.ACC)
                if gate.ptr is not None:
                    g = tl.load(gate_column + h.to(tl.int64) * whole(gate.sh, B.VEC), mask=hit, other=0.0)
                    value *= slope(g.to(B.ACC), GATE)
                accs = _spread(accs, value, taps, v * UP_H, F.DOWN_H, F.DIL_H)

    j = p * UP_W + phase - lead_w
    inside = (j >= 0) & (j < size.OW) & wanted
    j = j.to(tl.int64)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + c, mask=wanted, other=0.0).to(B.ACC)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + c, mask=wanted, other=0.0).to(B.ACC)
    for a in tl.static_range(TH):
        i = (line * TH + a - lead_h).to(tl.int64)
        keep = inside & (i >= 0) & (i < size.OH)
        total = accs[a]
        if scale_ptr is not None:
            total *= scale
        if shift_ptr is not None:
            total += shift
        if residual.ptr is not None:
            at = residual.ptr + place(residual, n, i, j, B.VEC) + c
            total += tl.load(at, mask=keep, other=0.0).to(B.ACC)
        if z.ptr is not None:
            tl.store(z.ptr + place(z, n, i, j, B.VEC) + c, total.to(z.ptr.dtype.element_ty), mask=keep)
        total = activate(total, ACT)
        if mask.ptr is not None:
            at = mask.ptr + place(mask, n, i, j, B.VEC) + c
            total *= slope(tl.load(at, mask=keep, other=0.0).to(B.ACC), MASK)
        tl.store(y.ptr + place(y, n, i, j, B.VEC) + c, total.to(y.ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["tiles", "share", "top", "left"])
def _depthwise_wgrad_kernel(
    x,  # map [N, C, H, W]
    dy,  # map [N, C, OH, OW]
    gate,  # map [N, C, OH, OW] or None
    part_ptr,  # [splits, R*S + 1, C], last the sum of dz
    size,
    tiles,
    share,  # all tiles, and how many of them one split sums
    top,
    left,
    GATE: tl.constexpr,
    F: tl.constexpr,
    B: tl.constexpr,
):
    """The sums of RB x SB taps of BC channels over one split of the pixels, and that of dz."""
    RB: tl.constexpr = B.RB
    SB: tl.constexpr = B.SB
    TH: tl.constexpr = B.TH
    BW: tl.constexpr = B.BW
    BC: tl.constexpr = B.BC
    pid = tl.program_id(0)
    split = tl.program_id(1)
    C = whole(size.C, B.VEC)
    blocks = tl.cdiv(size.C, BC)
    across = (F.S + SB - 1) // SB
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    r0, s0 = pid // blocks // across * RB, pid // blocks % across * SB
    wanted = c < C

    sums = (tl.zeros((BW, BC), B.ACC),) * (RB * SB)  # by filter column, then by filter row
    total = tl.zeros((BW, BC), B.ACC)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        j = tile % size.segments * BW + tl.arange(0, BW)[:, None]  # [BW, 1]
        i0 = tile // size.segments % size.lines * TH
        n = (tile // size.segments // size.lines).to(tl.int64)
        dzs = ()
        for a in tl.static_range(TH):
            i = (i0 + a).to(tl.int64)
            keep = (j < size.OW) & wanted & (i < size.OH)
            at = place(dy, n, i, j.to(tl.int64), B.VEC) + c
            dz = tl.load(dy.ptr + at, mask=keep, other=0.0).to(B.ACC)
            if gate.ptr is not None:
                at = place(gate, n, i, j.to(tl.int64), B.VEC) + c
                dz *= slope(tl.load(gate.ptr + at, mask=keep, other=0.0).to(B.ACC), GATE)
            total += dz
            dzs += (dz,)
        for s in tl.static_range(SB):
            w = j * F.DOWN_W - left + (s0 + s) * F.DIL_W
            inside = (w >= 0) & (w < size.W) & wanted
            filter_column = sums[s * RB : (s + 1) * RB]
            x_column = x.ptr + n * whole(x.sn, B.VEC) + w.to(tl.int64) * whole(x.sw, B.VEC) + c
            for v in tl.static_range((TH - 1) * F.DOWN_H + (RB - 1) * F.DIL_H + 1):
                h = i0 * F.DOWN_H - top + r0 * F.DIL_H + v
                hit = inside & (h >= 0) & (h < size.H)
                value = tl.load(x_column + h.to(tl.int64) * whole(x.sh, B.VEC), mask=hit, other=0.0).to(B.ACC)
                filter_column = _spread(filter_column, value, dzs, v, F.DIL_H, F.DOWN_H)
            sums = sums[: s * RB] + filter_column + sums[(s + 1) * RB :]

    part = part_ptr + split.to(tl.int64) * ((F.R * F.S + 1) * C) + c  # [1, BC]
    for r in tl.static_range(RB):
        for s in tl.static_range(SB):
            keep = wanted & (r0 + r < F.R) & (s0 + s < F.S)
            value = tl.sum(sums[s * RB + r], axis=0, keep_dims=True)
            tl.store(part + ((r0 + r) * F.S + s0 + s) * C, value, mask=keep)
    if (r0 == 0) & (s0 == 0):
        tl.store(part + F.R * F.S * C, tl.sum(total, axis=0, keep_dims=True), mask=wanted)


def _check_filter(name: str, weight: Tensor, channels: int) -> None:
    if weight.shape[:2] != (channels, 1):
        raise ValueError(
            f"{name}: weights of shape {tuple(weight.shape)} for {channels} channels; expected ({channels}, 1, R, S)"
        )


class Walk(NamedTuple):
    """Steps from one output to the next on the input, and between values of the input: one of them is 1.

    Attributes:
        top, left: zeros before the input, counted between its values.
        turned: whether the filters are.
    """

    down: tuple[int, int]
    up: tuple[int, int]
    top: int
    left: int
    turned: bool


def _launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    walk: Walk,
    dilation: tuple[int, int],
    *,
    act: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    gate: Tensor | None = None,
    gate_act: str = "none",
    mask: Tensor | None = None,
    mask_act: str = "none",
) -> None:
    n, channels, h, w = x.shape
    _, _, oh, ow = y.shape
    _, _, r, s = weight.shape
    if not y.numel():
        return
    # The first tile begins where its first tap falls on a value of the raised grid.
    (up_h, up_w), lead_h, lead_w = walk.up, -walk.top % walk.up[0], -walk.left % walk.up[1]
    tile = depthwise_tile(x.dtype, channels, oh + lead_h, triton.cdiv(ow + lead_w, up_w))
    rows = triton.cdiv(tile.rows, up_h) * up_h
    held = r if r <= FILTER_ROWS else triton.cdiv(equal_part(r, FILTER_ROWS), up_h) * up_h
    lines, segments = triton.cdiv(oh + lead_h, rows), triton.cdiv(ow + lead_w, tile.pixels * up_w)
    programs = triton.cdiv(channels, tile.channels) * up_w * segments * lines * n
    if programs >= 2**31:
        raise ValueError(f"depthwise: an output of {n} x {oh} x {ow} pixels is too large; use smaller tiles")
    maps = x, gate, residual, mask, y, z
    _depthwise_kernel[(programs,)](
        *map(as_map, maps),
        weight.reshape(channels, r * s).t().contiguous(),
        scale,
        shift,
        Sizes(h, w, oh, ow, channels, lines, segments),
        lead_h,
        lead_w,
        (lead_h + walk.top) // up_h,
        (lead_w + walk.left) // up_w,
        UP_H=up_h,
        UP_W=up_w,
        S_STEP=up_w // math.gcd(up_w, dilation[1]),
        TURNED=walk.turned,
        ACT=act,
        GATE=gate_act,
        MASK=mask_act,
        F=Filter(r, s, *walk.down, *dilation),
        B=Block(held, 1, rows, tile.pixels, tile.channels, vector(*maps), accumulator(x.dtype)),
        num_warps=tile.num_warps,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: ConvGeometry,
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
        scale, shift: (C,).
        residual, z: windows of y's size.
    """
    _check_filter("depthwise_forward", weight, x.shape[1])
    walk = Walk(geometry.stride, (1, 1), geometry.top, geometry.left, False)
    _launch(x, weight, y, walk, geometry.dilation, act=act, scale=scale, shift=shift, residual=residual, z=z)


def dgrad(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    geometry: ConvGeometry,
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
        geometry: of the forward.
        gate: window of dy's size, y or z of the op itself. `gate_act` says whose slope it gives.
        addend: window of dx's size, the gradient that comes along another branch.
        mask: window of dx's size, y or z of the activation that made x. `mask_act` says whose slope it gives.
    """
    _check_filter("depthwise_dgrad", weight, dy.shape[1])
    top = geometry.dilation_h * (weight.shape[2] - 1) - geometry.top
    left = geometry.dilation_w * (weight.shape[3] - 1) - geometry.left
    slopes = {"gate": gate, "gate_act": gate_act, "mask": mask, "mask_act": mask_act}
    walk = Walk((1, 1), geometry.stride, top, left, True)
    _launch(dy, weight, dx, walk, geometry.dilation, residual=addend, **slopes)


def wgrad(
    x: Tensor,
    dy: Tensor,
    dw: Tensor,
    dshift: Tensor,
    geometry: ConvGeometry,
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
    _check_filter("depthwise_wgrad", dw, x.shape[1])
    n, channels, h, w = x.shape
    _, _, oh, ow = dy.shape
    _, _, r, s = dw.shape
    if not dy.numel():
        return
    rows = equal_part(r, FILTER_ROWS)
    columns = equal_part(s, TAPS // rows)
    tile = depthwise_wgrad_tile(x.dtype, channels, oh, ow, rows * columns)
    lines, segments = triton.cdiv(oh, tile.rows), triton.cdiv(ow, tile.pixels)
    tiles = n * lines * segments
    programs = triton.cdiv(channels, tile.channels) * triton.cdiv(r, rows) * triton.cdiv(s, columns)
    share = triton.cdiv(tiles, depthwise_wgrad_splits(programs, tiles))
    splits = triton.cdiv(tiles, share)
    part = torch.empty(splits, r * s + 1, channels, dtype=dw.dtype, device=x.device)
    acc = accumulator(x.dtype)
    _depthwise_wgrad_kernel[(programs, splits)](
        *map(as_map, (x, dy, gate)),
        part,
        Sizes(h, w, oh, ow, channels, lines, segments),
        tiles,
        share,
        geometry.top,
        geometry.left,
        GATE=gate_act,
        F=Filter(r, s, *geometry.stride, *geometry.dilation),
        B=Block(rows, columns, tile.rows, tile.pixels, tile.channels, vector(x, dy, gate), acc),
        num_warps=tile.num_warps,
    )
    total = part.sum(0)
    dw.view(channels, r * s).add_(total[:-1].t())
    dshift.add_(total[-1])


def depthwise_backward_reference(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    gate_act: str,
    addend: Tensor | None,
    mask: Tensor | None,
    mask_act: str,
    geometry: ConvGeometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw and dshift in plain PyTorch; the forward's reference is that of every convolution."""
    dz = dy if gate is None else dy * slope_reference(gate, gate_act)
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        _, z = conv2d_forward_reference(x, weight, None, None, None, geometry, "none")
        dx, dw = torch.autograd.grad(z, (x, weight), dz)
    dx = dx if addend is None else dx + addend
    return dx if mask is None else dx * slope_reference(mask, mask_act), dw, dz.sum((0, 2, 3))
