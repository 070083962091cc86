"""The two kernels of the depthwise convolution; see `depthwise.py`."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .activations import activate, slope
from .stream import map_offsets, whole
from .triton_private import jit_kernel


class Sizes(NamedTuple):
    """Rows and columns of input and output, channels; tiles of TH rows per image and of columns per row.

    Passed one by one, like a `Share`.
    """

    H: int
    W: int
    OH: int
    OW: int
    C: int
    lines: int
    segments: int


class Filter(NamedTuple):
    """Compile-time constants: the filter, and steps from one output and from one tap to the next."""

    R: int
    S: int
    DOWN_H: int
    DOWN_W: int
    DIL_H: int
    DIL_W: int


class DepthwiseBlock(NamedTuple):
    """Compile-time constants: filter rows and columns held at once; rows, pixels, channels of a tile; of a vector."""

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

    Forward and data gradient add a row of input to rows of output, with filter rows as factors; the weight gradient
    adds it to filter rows, with rows of dz as factors.
    """
    for a in tl.static_range(len(sums)):
        for b in tl.static_range(len(factors)):
            if a * APART + b * FACTORS_APART == at:
                sums = sums[:a] + (sums[a] + x * factors[b],) + sums[a + 1 :]  # noqa: RUF005  (Triton knows no *)
    return sums


@jit_kernel([*Sizes._fields, "lead_h", "lead_w", "base_h", "base_w"])
def depthwise_kernel(
    x,  # map [N, C, H, W]
    gate,  # map [N, C, H, W] or None
    residual,  # map [N, C, OH, OW] or None
    mask,  # map [N, C, OH, OW] or None
    y,  # map [N, C, OH, OW]
    z,  # map [N, C, OH, OW] or None
    w_ptr,  # [R*S, C]
    shift_ptr,  # [C] or None
    H,
    W,
    OH,
    OW,
    C,
    lines,
    segments,
    lead_h,
    lead_w,  # the first tile begins at output (-lead_h, -lead_w), so that ...
    base_h,
    base_w,  # ... its first tap coincides with a value of the input, (-base_h, -base_w)
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    S_STEP: tl.constexpr,
    FLIPPED: tl.constexpr,
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
    # Channels first, then the phases of one segment, then along the row: concurrent programs read the same lines.
    pid = tl.program_id(0)
    C = whole(C, B.VEC)
    blocks = tl.cdiv(C, BC)
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    phase = pid // blocks % UP_W
    p = pid // blocks // UP_W % segments * BW + tl.arange(0, BW)[:, None]  # [BW, 1]
    line = pid // blocks // UP_W // segments % lines
    n = (pid // blocks // UP_W // segments // lines).to(tl.int64)
    wanted = c < C
    # Taps are loaded in the layout of their use; a [1, BC] load would be exchanged through shared memory.
    w_tap = w_ptr + tl.broadcast_to(c, (BW, BC))
    x_line = x.ptr + n * whole(x.sn, B.VEC) + c
    gate_line = gate.ptr + n * whole(gate.sn, B.VEC) + c if gate.ptr is not None else None

    # A phase of columns uses every S_STEP-th filter column from `first` on; with gaps, perhaps none.
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
                tap = F.R * F.S - 1 - tap if FLIPPED else tap
                taps += (tl.load(w_tap + tap * C, mask=wanted & (r0 + r < F.R), other=0.0).to(B.ACC),)
            w = p * F.DOWN_W - base_w + (phase + s * F.DIL_W) // UP_W
            inside = (w >= 0) & (w < W) & wanted
            x_column = x_line + w.to(tl.int64) * whole(x.sw, B.VEC)
            gate_column = gate_line + w.to(tl.int64) * whole(gate.sw, B.VEC) if gate.ptr is not None else None
            for v in tl.static_range(((TH - 1) * F.DOWN_H + (RB - 1) * F.DIL_H) // UP_H + 1):
                h = line * (TH * F.DOWN_H // UP_H) - base_h + r0 * F.DIL_H // UP_H + v
                hit = inside & (h >= 0) & (h < H)
                value = tl.load(x_column + h.to(tl.int64) * whole(x.sh, B.VEC), mask=hit, other=0.0).to(B.ACC)
                if gate.ptr is not None:
                    g = tl.load(gate_column + h.to(tl.int64) * whole(gate.sh, B.VEC), mask=hit, other=0.0)
                    value *= slope(g.to(B.ACC), GATE)
                accs = _spread(accs, value, taps, v * UP_H, F.DOWN_H, F.DIL_H)

    j = p * UP_W + phase - lead_w
    inside = (j >= 0) & (j < OW) & wanted
    j = j.to(tl.int64)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + c, mask=wanted, other=0.0).to(B.ACC)
    for a in tl.static_range(TH):
        i = (line * TH + a - lead_h).to(tl.int64)
        keep = inside & (i >= 0) & (i < OH)
        total = accs[a]
        if shift_ptr is not None:
            total += shift
        if residual.ptr is not None:
            at = residual.ptr + map_offsets(residual, n, i, j, B.VEC) + c
            total += tl.load(at, mask=keep, other=0.0).to(B.ACC)
        if z.ptr is not None:
            tl.store(z.ptr + map_offsets(z, n, i, j, B.VEC) + c, total.to(z.ptr.dtype.element_ty), mask=keep)
        total = activate(total, ACT)
        if mask.ptr is not None:
            at = mask.ptr + map_offsets(mask, n, i, j, B.VEC) + c
            total *= slope(tl.load(at, mask=keep, other=0.0).to(B.ACC), MASK)
        tl.store(y.ptr + map_offsets(y, n, i, j, B.VEC) + c, total.to(y.ptr.dtype.element_ty), mask=keep)


@jit_kernel([*Sizes._fields, "tiles", "share", "top", "left"])
def depthwise_wgrad_kernel(
    x,  # map [N, C, H, W]
    dy,  # map [N, C, OH, OW]
    gate,  # map [N, C, OH, OW] or None
    part_ptr,  # [splits, R*S + 1, C], last the sum of dz
    H,
    W,
    OH,
    OW,
    C,
    lines,
    segments,
    tiles,
    share,  # all tiles, and the tiles per split
    top,
    left,
    GATE: tl.constexpr,
    F: tl.constexpr,
    B: tl.constexpr,
):
    """The sums of RB x SB taps of BC channels over one split of the pixels, and the sum of dz."""
    RB: tl.constexpr = B.RB
    SB: tl.constexpr = B.SB
    TH: tl.constexpr = B.TH
    BW: tl.constexpr = B.BW
    BC: tl.constexpr = B.BC
    pid = tl.program_id(0)
    split = tl.program_id(1)
    C = whole(C, B.VEC)
    blocks = tl.cdiv(C, BC)
    across = (F.S + SB - 1) // SB
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    r0, s0 = pid // blocks // across * RB, pid // blocks % across * SB
    wanted = c < C

    sums = (tl.zeros((BW, BC), B.ACC),) * (RB * SB)  # by filter column, then by filter row
    total = tl.zeros((BW, BC), B.ACC)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        j = tile % segments * BW + tl.arange(0, BW)[:, None]  # [BW, 1]
        i0 = tile // segments % lines * TH
        n = (tile // segments // lines).to(tl.int64)
        dzs = ()
        for a in tl.static_range(TH):
            i = (i0 + a).to(tl.int64)
            keep = (j < OW) & wanted & (i < OH)
            at = map_offsets(dy, n, i, j.to(tl.int64), B.VEC) + c
            dz = tl.load(dy.ptr + at, mask=keep, other=0.0).to(B.ACC)
            if gate.ptr is not None:
                at = map_offsets(gate, n, i, j.to(tl.int64), B.VEC) + c
                dz *= slope(tl.load(gate.ptr + at, mask=keep, other=0.0).to(B.ACC), GATE)
            total += dz
            dzs += (dz,)
        for s in tl.static_range(SB):
            w = j * F.DOWN_W - left + (s0 + s) * F.DIL_W
            inside = (w >= 0) & (w < W) & wanted
            filter_column = sums[s * RB : (s + 1) * RB]
            x_column = x.ptr + n * whole(x.sn, B.VEC) + w.to(tl.int64) * whole(x.sw, B.VEC) + c
            for v in tl.static_range((TH - 1) * F.DOWN_H + (RB - 1) * F.DIL_H + 1):
                h = i0 * F.DOWN_H - top + r0 * F.DIL_H + v
                hit = inside & (h >= 0) & (h < H)
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
