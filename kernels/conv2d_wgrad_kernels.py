"""The kernels of the weight gradient; see `conv2d_wgrad.py`.

There are two forms, as in `conv2d_kernels.py`. The descriptor form loads a segment of one row of dz and the segments of
x at the taps of one filter row, so dz is read, and its slope applied, once per filter row. Here dz is the right
operand: Hopper reads left operands from registers while it multiplies, and Triton (3.6, 3.7) may overwrite a computed
one too early (triton-lang/triton#9433). The pointer form uses any columns of the flattened filter, which suits few
input channels, groups and older chips.
"""

from __future__ import annotations

import triton.language as tl

from .activations import slope
from .stream import map_offsets
from .triton_private import jit_kernel


# Integers that depend on the image's size are not specialised: a new size needs no compilation.
@jit_kernel(["OH", "segments", "total", "share", "top", "shift_even", "shift_odd"])
def wgrad_descriptor_kernel(
    x_desc,  # [N, H, W, CIN] window; with a stride of two its even columns
    x_odd_desc,  # the odd columns
    dy_desc,  # [N, OH, OW, K] window
    gate_desc,  # [N, OH, OW, K] window or None
    dw_ptr,  # [splits, K, R, S, CIN], or the buffer [K, R, S, CIN]
    dshift_ptr,  # [splits, K], or the buffer [K], or None
    length,  # elements from one split to the next
    OH,
    K,
    CIN,
    segments,
    total,
    share,  # segments per row, of all rows, per split
    top,
    dil_h,
    shift_even,
    shift_odd,  # row of tap 0 is i*stride - top; column shifts of the two column phases
    GATE: tl.constexpr,
    ADD: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
):
    """dw of one filter row, BN input and BM output channels, over one split of the pixels, BK at a time."""
    S: tl.constexpr = P.S
    BM: tl.constexpr = P.BM
    BN: tl.constexpr = P.BN
    BK: tl.constexpr = P.BK
    # Programs of one split read the same pixels: they run together and share them in L2.
    blocks_k = tl.cdiv(K, BM)
    blocks_c = tl.cdiv(CIN, BN)
    pid = tl.program_id(0)
    k0 = (pid % blocks_k) * BM
    c0 = (pid // blocks_k % blocks_c) * BN
    r = pid // blocks_k // blocks_c % P.R
    split = pid // blocks_k // blocks_c // P.R
    first = split * share
    # A split without pixels adds the zeros past the last image. ptxas would serialize the products of a loop that may
    # be skipped, because the bypass also sets their accumulators.
    steps = tl.maximum(tl.minimum(share, total - first), 1)

    accs = ()
    for _ in tl.static_range(S):
        accs = accs + (tl.zeros((BN, BM), P.ACC),)  # noqa: RUF005  Triton does not unpack
    sums = tl.zeros((BK, BM), P.ACC)
    for step in range(steps):
        t = first + step
        j = (t % segments) * BK
        line = t // segments
        n = line // OH
        i = line % OH
        # Pixels beyond the row's end are zeros in dy, so the values of x there do not matter.
        dz = dy_desc.load([n, i, j, k0]).reshape(BK, BM)
        if gate_desc is not None or dshift_ptr is not None:
            d = dz.to(P.ACC)
            if gate_desc is not None:
                d *= slope(gate_desc.load([n, i, j, k0]).reshape(BK, BM).to(P.ACC), GATE)
                dz = d.to(dy_desc.dtype)
            # Summed per thread: a sum over threads here would stall the products.
            if dshift_ptr is not None:
                sums += d
        added = ()
        for s in tl.static_range(S):
            row = i * STEPS.STRIDE_H - top + r * dil_h
            if s % STEPS.STRIDE_W == 0:
                x = x_desc.load([n, row, j + s * STEPS.DIL_W // STEPS.STRIDE_W + shift_even, c0]).reshape(BK, BN)
            else:
                x = x_odd_desc.load([n, row, j + (s * STEPS.DIL_W - 1) // STEPS.STRIDE_W + shift_odd, c0]).reshape(
                    BK, BN
                )
            acc = tl.dot(x.T, dz, accs[s], input_precision=P.PRECISION, out_dtype=P.ACC)
            added = added + (acc,)  # noqa: RUF005
        accs = added

    k, c = k0 + tl.arange(0, BM), c0 + tl.arange(0, BN)
    keep = (c < CIN)[:, None] & (k < K)[None, :]
    base = split.to(tl.int64) * length
    for s in tl.static_range(S):
        at = dw_ptr + base + k[None, :] * (P.R * S * CIN) + (r * S + s) * CIN + c[:, None]  # [BN, BM]
        acc = accs[s]
        if ADD:
            acc += tl.load(at, mask=keep)
        tl.store(at, acc, mask=keep)
    if dshift_ptr is not None:  # noqa: SIM102  decided when compiled
        if (c0 == 0) & (r == 0):
            to = dshift_ptr + base + k
            total_dz = tl.sum(sums, 0)
            if ADD:
                total_dz += tl.load(to, mask=k < K)
            tl.store(to, total_dz, mask=k < K)


@jit_kernel(["H", "W", "OH", "OW", "pixels", "share", "top", "left"])
def wgrad_pointer_kernel(
    x,  # map [N, groups * CIN, H, W]
    dy,  # map [N, groups * K, OH, OW]
    gate,  # map [N, groups * K, OH, OW] or None
    dw_ptr,  # [splits, groups * K, R, S, CIN], or the buffer [groups * K, R, S, CIN]
    dshift_ptr,  # [splits, groups * K], or the buffer [groups * K], or None
    length,  # elements from one split to the next
    H,
    W,
    OH,
    OW,
    pixels,
    K,
    groups,
    share,  # K: output channels of one group; share: blocks of pixels per split
    top,
    left,
    stride_h,
    stride_w,
    dil_h,
    dil_w,
    CIN: tl.constexpr,
    GATE: tl.constexpr,
    ADD: tl.constexpr,
    P: tl.constexpr,
):
    """dw of BM output channels of a group and BN columns of its filters, over one split, BK pixels at a time."""
    S: tl.constexpr = P.S
    BM: tl.constexpr = P.BM
    BN: tl.constexpr = P.BN
    BK: tl.constexpr = P.BK
    blocks_k = tl.cdiv(K, BM)
    COLUMNS: tl.constexpr = P.R * S * CIN
    blocks_c: tl.constexpr = (COLUMNS + BN - 1) // BN
    pid = tl.program_id(0)
    k = (pid % blocks_k) * BM + tl.arange(0, BM)  # [BM] output channels within the group
    column = (pid // blocks_k % blocks_c) * BN + tl.arange(0, BN)  # [BN] of the flattened filter
    group = pid // blocks_k // blocks_c % groups
    split = pid // blocks_k // blocks_c // groups
    tap = column // CIN
    dh, dw = tap // S * dil_h - top, tap % S * dil_w - left
    shift = dh.to(tl.int64) * x.sh + dw.to(tl.int64) * x.sw + group * CIN + column % CIN

    acc = tl.zeros((BM, BN), P.ACC)
    sums = tl.zeros((BK, BM), P.ACC)
    for t in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(pixels, BK))):
        p = t * BK + tl.arange(0, BK)  # [BK] output pixels
        n, i, j = (p // (OH * OW)).to(tl.int64), p // OW % OH, p % OW
        h, w = (i * stride_h)[:, None] + dh[None, :], (j * stride_w)[:, None] + dw[None, :]
        hit = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (p < pixels)[:, None] & (column < COLUMNS)[None, :]
        pixel = map_offsets(x, n, (i * stride_h).to(tl.int64), (j * stride_w).to(tl.int64), 1)
        values = tl.load(x.ptr + pixel[:, None] + shift[None, :], mask=hit, other=0.0)  # [BK, BN]
        i, j = i.to(tl.int64), j.to(tl.int64)
        inside = (p < pixels)[:, None] & (k < K)[None, :]
        at = map_offsets(dy, n, i, j, 1)[:, None] + (group * K + k)[None, :]
        dz = tl.load(dy.ptr + at, mask=inside, other=0.0)  # [BK, BM]
        if gate.ptr is not None:
            at = map_offsets(gate, n, i, j, 1)[:, None] + (group * K + k)[None, :]
            d = dz.to(P.ACC) * slope(tl.load(gate.ptr + at, mask=inside, other=0.0).to(P.ACC), GATE)
            dz = d.to(dy.ptr.dtype.element_ty)
        else:
            d = dz.to(P.ACC)
        if dshift_ptr is not None:
            sums += d
        acc = tl.dot(dz.T, values, acc, input_precision=P.PRECISION, out_dtype=P.ACC)

    base = split.to(tl.int64) * length
    keep = (k < K)[:, None] & (column < COLUMNS)[None, :]
    at = dw_ptr + base + (group * K + k)[:, None] * COLUMNS + column[None, :]
    if ADD:
        acc += tl.load(at, mask=keep)
    tl.store(at, acc, mask=keep)
    if dshift_ptr is not None:  # noqa: SIM102  decided when compiled
        if pid // blocks_k % blocks_c == 0:
            to = dshift_ptr + base + group * K + k
            total_dz = tl.sum(sums, 0)
            if ADD:
                total_dz += tl.load(to, mask=k < K)
            tl.store(to, total_dz, mask=k < K)


@jit_kernel(["splits"])
def add_splits_kernel(
    part_ptr,  # [splits, length]
    dw_ptr,  # [weights]
    dshift_ptr,  # [length - weights] or None
    weights,
    length,
    splits,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dw and dshift += the sum of BLOCK elements over all splits, ROWS splits at a time."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), part_ptr.dtype.element_ty)
    for first in range(0, splits, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * length + e[None, :]
        acc += tl.load(part_ptr + at, mask=(row < splits)[:, None] & (e < length)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    is_weight, is_shift = e < weights, (e >= weights) & (e < length)
    tl.store(dw_ptr + e, tl.load(dw_ptr + e, mask=is_weight, other=0.0) + total, mask=is_weight)
    if dshift_ptr is not None:
        at = dshift_ptr + e - weights
        tl.store(at, tl.load(at, mask=is_shift, other=0.0) + total, mask=is_shift)
