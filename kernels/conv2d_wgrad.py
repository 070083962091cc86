"""Fused weight gradient of a convolution, added to the caller's buffers:

    dw[k, c, r, s] += sum over n, i, j of  dz[n, k, i, j] * x[n, c, i*stride - top + r*dilation,
                                                                    j*stride - left + s*dilation]
    dshift[k]      += sum over n, i, j of  dz[n, k, i, j],          dz = dy * slope(gate)

As a matrix product: output channels by taps x input channels, summed over output pixels. In products dz is rounded to
the dtype of dy, as if it had been stored; its sum is taken before rounding.

Buffers are float32 (float64 for float64 maps). The pixels are split over programs; a split sums at most 64k pixels (a
longer sum in float32 would show its rounding) and is written on its own; a second kernel adds all splits to the buffers
in their order. There are no atomics: two runs agree bit by bit.

Two kernels, as in `conv2d_forward.py`. The descriptor form takes a segment of one row of dz and the segments of x that
the taps of one filter row shift it to; so dz is read, and its slope applied, once per filter row. There dz is the right
operand: Hopper reads left operands from registers while it multiplies, and Triton (3.6, 3.7) may overwrite a computed
one too early (triton-lang/triton#9433). The pointer form takes any columns of the flattened filter, which suits few
input channels; it does groups and older chips too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import slope, slope_reference
from .conv2d_forward import Product, Steps
from .dtypes import sum_dtype
from .stream import as_map, place
from .tuning import programs_at_once, register_limit, split_count, splits_blocks, wgrad_config
from .windows import ConvGeometry, as_one_row, can_describe_product, column_phases, describe, is_dense


# Integers that follow from the image's size are not specialised: a new size compiles nothing.
@triton.jit(do_not_specialize=["OH", "segments", "total", "share", "top", "shift_even", "shift_odd"])
def _wgrad_descriptor_kernel(
    x_desc,  # [N, H, W, CIN] window; with a stride of two its even columns
    x_odd_desc,  # the odd columns
    dy_desc,  # [N, OH, OW, K] window
    gate_desc,  # [N, OH, OW, K] window or None
    dw_ptr,  # [splits, K, R, S, CIN], or the buffer [K, R, S, CIN]
    dshift_ptr,  # [splits, K], or the buffer [K], or None
    length,  # elements from one split to the next
    OH,
    K,
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
    blocks_c: tl.constexpr = (STEPS.CIN + BN - 1) // BN
    pid = tl.program_id(0)
    k0 = (pid % blocks_k) * BM
    c0 = (pid // blocks_k % blocks_c) * BN
    r = pid // blocks_k // blocks_c % P.R
    split = pid // blocks_k // blocks_c // P.R
    first = split * share
    # A split without pixels adds the zeros past the last image: ptxas would serialize the products of a loop that may
    # be skipped, because the way around it sets their accumulators as well.
    turns = tl.maximum(tl.minimum(share, total - first), 1)

    accs = ()
    for _ in tl.static_range(S):
        accs = accs + (tl.zeros((BN, BM), P.ACC),)  # noqa: RUF005  Triton does not unpack
    sums = tl.zeros((BK, BM), P.ACC)
    for turn in range(turns):
        t = first + turn
        j = (t % segments) * BK
        line = t // segments
        n = line // OH
        i = line % OH
        # Pixels beyond the row's end are zeros in dy, so what x holds there does not matter.
        dz = dy_desc.load([n, i, j, k0]).reshape(BK, BM)
        if gate_desc is not None or dshift_ptr is not None:
            d = dz.to(P.ACC)
            if gate_desc is not None:
                d *= slope(gate_desc.load([n, i, j, k0]).reshape(BK, BM).to(P.ACC), GATE)
                dz = d.to(dy_desc.dtype)
            # Pixel by pixel, as each thread holds them: to sum over threads here would stall the products.
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
    keep = (c < STEPS.CIN)[:, None] & (k < K)[None, :]
    base = split.to(tl.int64) * length
    for s in tl.static_range(S):
        at = dw_ptr + base + k[None, :] * (P.R * S * STEPS.CIN) + (r * S + s) * STEPS.CIN + c[:, None]  # [BN, BM]
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


@triton.jit(do_not_specialize=["H", "W", "OH", "OW", "pixels", "share", "top", "left"])
def _wgrad_pointer_kernel(
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
        pixel = place(x, n, (i * stride_h).to(tl.int64), (j * stride_w).to(tl.int64), 1)
        values = tl.load(x.ptr + pixel[:, None] + shift[None, :], mask=hit, other=0.0)  # [BK, BN]
        i, j = i.to(tl.int64), j.to(tl.int64)
        inside = (p < pixels)[:, None] & (k < K)[None, :]
        at = place(dy, n, i, j, 1)[:, None] + (group * K + k)[None, :]
        dz = tl.load(dy.ptr + at, mask=inside, other=0.0)  # [BK, BM]
        if gate.ptr is not None:
            at = place(gate, n, i, j, 1)[:, None] + (group * K + k)[None, :]
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


@triton.jit(do_not_specialize=["splits"])
def _add_splits_kernel(
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


def launch(
    dw: Tensor,
    dshift: Tensor | None,
    x: Tensor,
    dy: Tensor,
    gate: Tensor | None,
    gate_act: str,
    geometry: ConvGeometry,
    *,
    splits: int | None = None,
) -> None:
    """Add the gradients to dw, and to dshift if given; see the formula above.

    Args:
        dw: (K, C / groups, R, S) in channels-last memory, float32 (float64 for float64 maps).
        dshift: (K,) of the same dtype.
        x: (N, C, H, W) window.
        dy: (N, K, OH, OW) window.
        gate: window of dy's size. `gate_act` says whose slope it gives: "none" without a gate.
        splits: into how many parts the pixels are cut, if not as computed.
    """
    filters, depth, r, s = dw.shape
    groups, pixels = geometry.groups, dy.shape[0] * dy.shape[2] * dy.shape[3]
    held = sum_dtype(x.dtype)
    if dw.dtype != held or (dshift is not None and dshift.dtype != held):
        raise ValueError(f"conv2d_wgrad: gradients of {x.dtype} maps are summed in {held}; give buffers of that dtype")
    if not dw.permute(0, 2, 3, 1).is_contiguous() or (dshift is not None and not dshift.is_contiguous()):
        raise ValueError("conv2d_wgrad: the buffers are not dense; give dw in channels-last memory")
    if not dy.numel() or not (x.numel() or dshift is not None):
        return
    if gate is None:
        gate_act = "none"
    # A program of the descriptor form holds the accumulators of all taps of a row.
    described = s <= 12 and can_describe_product(x, geometry, dy, gate)
    maps = (x, dy, gate)
    if described and geometry.is_pixelwise((r, s)) and all(map(is_dense, maps)):
        x, dy, gate = (None if t is None else as_one_row(t) for t in maps)  # pyright: ignore
    lines, run = dy.shape[2:]
    columns = depth if described else r * s * depth
    config = wgrad_config(
        x.device,
        x.dtype,
        run if described else pixels,
        filters // groups,
        columns,
        s if described else 1,
        described,
        gate_act,
    )
    by_descriptors = config.form == "descriptor"
    if not by_descriptors:
        columns, run = r * s * depth, pixels
        if pixels + config.block_k >= 2**31:
            raise ValueError(f"conv2d_wgrad: {pixels} pixels are too many for the pointer form; use smaller tiles")
    length = dw.numel() + (0 if dshift is None else filters)
    tiles = triton.cdiv(filters // groups, config.block_m) * triton.cdiv(columns, config.block_n)
    tiles *= r if by_descriptors else groups
    segments = triton.cdiv(run, config.block_k)
    total = segments * (pixels // run)
    if splits is None:
        taps = s if by_descriptors else 1
        tile_bytes = (config.block_m * (1 if gate is None else 2) + taps * config.block_n) * config.block_k
        slots = programs_at_once(config.num_warps)
        sizes = tile_bytes * x.element_size(), length * dw.element_size()
        splits = split_count(tiles, total, config.block_k, *sizes, slots)
    part = None if splits == 1 else torch.empty(splits, length, dtype=held, device=dw.device)
    shifts = dshift if part is None or dshift is None else part[:, dw.numel() :]
    share = triton.cdiv(total, splits)
    options = {
        "GATE": gate_act,
        "ADD": part is None,
        "P": Product.of((r, s), config, x.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Left alone, ptxas spills a few addresses of wide elements so that one more program fits.
        **register_limit(x.device, 255 if x.element_size() > 2 else None),
    }
    if by_descriptors:
        box_x, box_dy = [1, 1, config.block_k, config.block_n], [1, 1, config.block_k, config.block_m]
        even, odd, shift_even, shift_odd = column_phases(x, geometry.stride_w, geometry.left)
        _wgrad_descriptor_kernel[(tiles * splits,)](
            describe(even, box_x, operand=True),
            describe(odd, box_x, operand=True),
            describe(dy, box_dy, operand=gate is None),
            None if gate is None else describe(gate, box_dy),
            dw if part is None else part,
            shifts,
            length,
            lines,
            filters,
            segments,
            total,
            share,
            geometry.top,
            geometry.dilation_h,
            shift_even,
            shift_odd,
            STEPS=Steps(depth, *geometry.stride, geometry.dilation_w),
            **options,
        )
    else:
        _wgrad_pointer_kernel[(tiles * splits,)](
            *map(as_map, (x, dy, gate)),
            dw if part is None else part,
            shifts,
            length,
            *x.shape[2:],
            *dy.shape[2:],
            pixels,
            filters // groups,
            groups,
            share,
            geometry.top,
            geometry.left,
            *geometry.stride,
            *geometry.dilation,
            CIN=depth,
            **options,
        )
    if part is not None:
        block, rows = splits_blocks(splits)
        _add_splits_kernel[(triton.cdiv(length, block),)](
            part, dw, dshift, dw.numel(), length, splits, BLOCK=block, ROWS=rows
        )


def conv2d_wgrad_reference(
    weight_size: Sequence[int], x: Tensor, dy: Tensor, gate: Tensor | None, gate_act: str, geometry: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """What is added to dw and to dshift, in plain PyTorch."""
    dz = dy if gate is None else dy * slope_reference(gate, gate_act)
    place = geometry.stride, 0, geometry.dilation, geometry.groups
    dw = torch.nn.grad.conv2d_weight(geometry.padded(x), tuple(weight_size), dz, *place)  # pyright: ignore
    return dw, dz.sum((0, 2, 3))
