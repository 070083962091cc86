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

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import MASKS, slope, slope_reference
from .dtypes import accumulator, dot_precision
from .tuning import Config, forced_config, has_descriptors, interpreting, power_of_two, shared_limit
from .windows import as_one_row, can_describe, can_describe_phases, column_phases, describe, is_dense, spatial_strides

# Output pixels that one split sums at most.
SPLIT_PIXELS = 65_536
# Multiprocessors that splits are counted for, on every chip, so that results do not depend on it.
PROCESSORS = 132


@triton.jit
def _wgrad_descriptor_kernel(
    x_desc,
    x_odd_desc,
    dy_desc,
    g_desc,  # windows; the odd columns of x are used for a stride of two
    dw_ptr,
    dshift_ptr,  # [splits, K, R, S, CIN] and [splits, K], or the buffers
    length,  # elements from one split to the next
    OH,
    K,
    segments,
    total,
    share,  # output rows and channels; segments per row, of all rows, per split
    top,
    dil_h,
    shift_even,
    shift_odd,  # row of tap 0 is i*stride - top; column shifts of the two column phases
    CIN: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_W: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    # Programs of one split read the same pixels: they run together and share them in L2.
    blocks_k = tl.cdiv(K, BM)
    blocks_c: tl.constexpr = (CIN + BN - 1) // BN
    pid = tl.program_id(0)
    k0 = (pid % blocks_k) * BM
    c0 = (pid // blocks_k % blocks_c) * BN
    r = pid // blocks_k // blocks_c % R
    split = pid // blocks_k // blocks_c // R
    first = split * share
    # A split without pixels adds the zeros past the last image: ptxas would serialize the products of a loop that may
    # be skipped, because the way around it sets their accumulators as well.
    turns = tl.maximum(tl.minimum(share, total - first), 1)

    accs = ()
    for _ in tl.static_range(S):
        accs = accs + (tl.zeros((BN, BM), ACC),)  # noqa: RUF005  Triton does not unpack
    sums = tl.zeros((BK, BM), ACC)
    for turn in range(turns):
        t = first + turn
        j = (t % segments) * BK
        line = t // segments
        n = line // OH
        i = line % OH
        # Pixels beyond the row's end are zeros in dy, so what x holds there does not matter.
        dz = dy_desc.load([n, i, j, k0]).reshape(BK, BM)
        if GATE != "none" or HAS_SHIFT:
            d = dz.to(ACC)
            if GATE != "none":
                d *= slope(g_desc.load([n, i, j, k0]).reshape(BK, BM).to(ACC), GATE)
                dz = d.to(dy_desc.dtype)
            # Pixel by pixel, as each thread holds them: to sum over threads here would stall the products.
            if HAS_SHIFT:
                sums += d
        added = ()
        for s in tl.static_range(S):
            row = i * STRIDE_H - top + r * dil_h
            if s % STRIDE_W == 0:
                x = x_desc.load([n, row, j + s * DIL_W // STRIDE_W + shift_even, c0]).reshape(BK, BN)
            else:
                x = x_odd_desc.load([n, row, j + (s * DIL_W - 1) // STRIDE_W + shift_odd, c0]).reshape(BK, BN)
            acc = tl.dot(x.T, dz, accs[s], input_precision=PRECISION, out_dtype=ACC)
            added = added + (acc,)  # noqa: RUF005
        accs = added

    k, c = k0 + tl.arange(0, BM), c0 + tl.arange(0, BN)
    keep = (c < CIN)[:, None] & (k < K)[None, :]
    base = split.to(tl.int64) * length
    for s in tl.static_range(S):
        at = dw_ptr + base + k[None, :] * (R * S * CIN) + (r * S + s) * CIN + c[:, None]  # [BN, BM]
        acc = accs[s]
        if ADD:
            acc += tl.load(at, mask=keep)
        tl.store(at, acc, mask=keep)
    if HAS_SHIFT:  # noqa: SIM102  decided when compiled
        if (c0 == 0) & (r == 0):
            to = dshift_ptr + base + k
            total_dz = tl.sum(sums, 0)
            if ADD:
                total_dz += tl.load(to, mask=k < K)
            tl.store(to, total_dz, mask=k < K)


@triton.jit
def _wgrad_pointer_kernel(
    x_ptr,
    dy_ptr,
    g_ptr,
    dw_ptr,
    dshift_ptr,  # [splits, groups * K, R, S, CIN] and [splits, groups * K], or the buffers
    length,  # elements from one split to the next
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,  # strides of image, row, pixel; channels have stride 1
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
    R: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks_k = tl.cdiv(K, BM)
    COLUMNS: tl.constexpr = R * S * CIN
    blocks_c: tl.constexpr = (COLUMNS + BN - 1) // BN
    pid = tl.program_id(0)
    k = (pid % blocks_k) * BM + tl.arange(0, BM)  # [BM] output channels within the group
    column = (pid // blocks_k % blocks_c) * BN + tl.arange(0, BN)  # [BN] of the flattened filter
    group = pid // blocks_k // blocks_c % groups
    split = pid // blocks_k // blocks_c // groups
    tap = column // CIN
    dh, dw = tap // S * dil_h - top, tap % S * dil_w - left
    shift = dh.to(tl.int64) * x_sh + dw.to(tl.int64) * x_sw + group * CIN + column % CIN

    acc = tl.zeros((BM, BN), ACC)
    sums = tl.zeros((BK, BM), ACC)
    for t in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(pixels, BK))):
        p = t * BK + tl.arange(0, BK)  # [BK] output pixels
        n, i, j = (p // (OH * OW)).to(tl.int64), p // OW % OH, p % OW
        h, w = (i * stride_h)[:, None] + dh[None, :], (j * stride_w)[:, None] + dw[None, :]
        hit = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (p < pixels)[:, None] & (column < COLUMNS)[None, :]
        pixel = n * x_sn + (i * stride_h).to(tl.int64) * x_sh + (j * stride_w).to(tl.int64) * x_sw
        x = tl.load(x_ptr + pixel[:, None] + shift[None, :], mask=hit, other=0.0)  # [BK, BN]
        i, j = i.to(tl.int64), j.to(tl.int64)
        inside = (p < pixels)[:, None] & (k < K)[None, :]
        at = (n * d_sn + i * d_sh + j * d_sw)[:, None] + (group * K + k)[None, :]
        dz = tl.load(dy_ptr + at, mask=inside, other=0.0)  # [BK, BM]
        if GATE != "none":
            at = (n * g_sn + i * g_sh + j * g_sw)[:, None] + (group * K + k)[None, :]
            d = dz.to(ACC) * slope(tl.load(g_ptr + at, mask=inside, other=0.0).to(ACC), GATE)
            dz = d.to(dy_ptr.dtype.element_ty)
        else:
            d = dz.to(ACC)
        if HAS_SHIFT:
            sums += d
        acc = tl.dot(dz.T, x, acc, input_precision=PRECISION, out_dtype=ACC)

    base = split.to(tl.int64) * length
    keep = (k < K)[:, None] & (column < COLUMNS)[None, :]
    at = dw_ptr + base + (group * K + k)[:, None] * COLUMNS + column[None, :]
    if ADD:
        acc += tl.load(at, mask=keep)
    tl.store(at, acc, mask=keep)
    if HAS_SHIFT:  # noqa: SIM102  decided when compiled
        if pid // blocks_k % blocks_c == 0:
            to = dshift_ptr + base + group * K + k
            total_dz = tl.sum(sums, 0)
            if ADD:
                total_dz += tl.load(to, mask=k < K)
            tl.store(to, total_dz, mask=k < K)


@triton.jit
def _add_splits_kernel(
    part_ptr,
    dw_ptr,
    dshift_ptr,  # [splits, length], [weights], [length - weights]
    weights,
    length,
    splits,
    HAS_SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), part_ptr.dtype.element_ty)
    for first in range(0, splits, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * length + e[None, :]
        acc += tl.load(part_ptr + at, mask=(row < splits)[:, None] & (e < length)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    is_weight, is_shift = e < weights, (e >= weights) & (e < length)
    tl.store(dw_ptr + e, tl.load(dw_ptr + e, mask=is_weight, other=0.0) + total, mask=is_weight)
    if HAS_SHIFT:
        at = dshift_ptr + e - weights
        tl.store(at, tl.load(at, mask=is_shift, other=0.0) + total, mask=is_shift)


def wgrad_config(
    device: torch.device,
    dtype: torch.dtype,
    run: int,
    filters: int,
    depth: int,
    taps: int,
    described: bool,
    gate_act: str = "none",
) -> Config:
    """The tile: block_m output channels x block_n input channels (columns of the filter for pointers), block_k pixels.

    Args:
        run: output pixels that lie side by side: a row for descriptors, all of them for pointers.
        filters: output channels (of a group).
        depth: input channels for descriptors, columns of the flattened filter for pointers.
        taps: tiles that a program holds at once: the taps of a filter row for descriptors, 1 for pointers.
        gate_act: the slope that dz takes.
    """
    form = "descriptor" if described else "pointer"
    config = forced_config()
    if config is not None:
        return config if described else replace(config, form="pointer")
    if interpreting():  # few large programs: a call costs more than its elements
        return Config(form, power_of_two(filters, 16, 128), power_of_two(depth, 16, 128), power_of_two(run, 16, 256))
    itemsize = dtype.itemsize
    if itemsize == 8 or (itemsize == 4 and dot_precision(dtype) == "ieee"):  # products without tensor cores
        return Config(form, power_of_two(filters, 16, 32), power_of_two(depth, 16, 32 if taps == 1 else 16), 16, 4, 3)
    block_k = power_of_two(run, 16, 128 // itemsize)
    if described:  # rows are input channels, 64 at least; accumulators take at most 96 registers of a thread
        block_n = power_of_two(depth, 64, 128 if taps == 1 else 64)
        block_m = power_of_two(filters, 16, min(128, 1 << (384 // taps).bit_length() - 1))
    else:  # every element has its own address and mask
        block_m = power_of_two(filters, 16, 128)
        block_n, block_k = power_of_two(depth, 16, 128 // itemsize), min(block_k, 32)
    if gate_act not in ("none", *MASKS):  # the slope takes registers of its own
        block_k = max(16, block_k // 2)
    num_warps = 8 if block_m == 128 or block_m * block_n * taps > 96 * 128 else 4
    stage = (block_m * (1 if gate_act == "none" else 2) + block_n * taps) * block_k * itemsize
    # Two programs of four warps share a multiprocessor. Beside the stages dz passes through shared memory.
    room = shared_limit(device) * num_warps // 8 - block_m * block_k * itemsize - 4096
    return Config(form, block_m, block_n, block_k, num_warps, max(1, min(4, room // stage)))


@functools.lru_cache(maxsize=4096)
def split_count(tiles: int, segments: int, segment: int, tile_bytes: int, split_bytes: int, slots: int) -> int:
    """Into how many splits the pixels are cut.

    The cost is counted in bytes: what the waves of programs load, and each split's sums, written and read once.

    Args:
        tiles: programs of one split.
        segments: blocks of pixels, of `segment` pixels each.
        tile_bytes: bytes that a program loads per block of pixels.
        split_bytes: bytes that a split writes.
        slots: programs that run at once.
    """

    def cost(splits: int) -> int:
        waves = triton.cdiv(tiles * splits, slots)
        return waves * slots * triton.cdiv(segments, splits) * tile_bytes + 2 * splits * split_bytes

    least = triton.cdiv(segments * segment, SPLIT_PIXELS)
    most = max(least, min(segments, least + triton.cdiv(4 * slots, tiles)))
    splits = min(range(least, most + 1), key=cost)
    return triton.cdiv(segments, triton.cdiv(segments, splits))


def launch(
    dw: Tensor,
    dshift: Tensor | None,
    x: Tensor,
    dy: Tensor,
    gate: Tensor | None,
    gate_act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
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
        padding: (top, bottom, left, right) rows and columns of zeros around x.
        splits: into how many parts the pixels are cut, if not as computed.
    """
    n, _, h, w = x.shape
    filters, depth, r, s = dw.shape
    _, _, oh, ow = dy.shape
    held = torch.float64 if x.dtype == torch.float64 else torch.float32
    if dw.dtype != held or (dshift is not None and dshift.dtype != held):
        raise ValueError(f"conv2d_wgrad: gradients of {x.dtype} maps are summed in {held}; give buffers of that dtype")
    if not dw.permute(0, 2, 3, 1).is_contiguous() or (dshift is not None and not dshift.is_contiguous()):
        raise ValueError("conv2d_wgrad: the buffers are not dense; give dw in channels-last memory")
    if not dy.numel() or not (x.numel() or dshift is not None):
        return
    if gate is None:
        gate_act = "none"
    top, left = padding[0], padding[2]
    described = (
        has_descriptors(x.device)
        and groups == 1
        and s <= 12  # a program holds the accumulators of all
        and stride[1] in (1, 2)
        and (stride[1] == 1 or dilation[1] % 2 == 1)
        and can_describe(x, dy, gate)
        and (stride[1] == 1 or can_describe_phases(x))
    )
    pixels = n * oh * ow
    lines, run = oh, ow
    maps = (x, dy, gate)
    if described and r == s == 1 and tuple(stride) == (1, 1) and not any(padding) and all(map(is_dense, maps)):
        x, dy, gate = (None if t is None else as_one_row(t) for t in maps)  # pyright: ignore
        lines, run = 1, pixels
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
    if config.form == "pointer":
        columns = r * s * depth
        if pixels + config.block_k >= 2**31:
            raise ValueError(
                f"conv2d_wgrad: {n} x {oh} x {ow} pixels are too many for the pointer form; use smaller tiles"
            )
    taps = s if config.form == "descriptor" else 1
    tiles = triton.cdiv(filters // groups, config.block_m) * triton.cdiv(columns, config.block_n)
    tiles *= r if config.form == "descriptor" else groups
    segments = triton.cdiv(run, config.block_k)
    total = segments * pixels // run if config.form == "descriptor" else triton.cdiv(pixels, config.block_k)
    length = dw.numel() + (0 if dshift is None else filters)
    if splits is None:
        tile_bytes = (config.block_m * (1 if gate is None else 2) + taps * config.block_n) * config.block_k
        splits = split_count(
            tiles,
            total,
            config.block_k,
            tile_bytes * x.element_size(),
            length * dw.element_size(),
            1 if interpreting() else PROCESSORS * (8 // config.num_warps),
        )
    part = None if splits == 1 else torch.empty(splits, length, dtype=held, device=dw.device)
    targets = (dw, dshift) if part is None else (part, part[:, dw.numel() :])
    share = triton.cdiv(total, splits)
    options = {
        "CIN": depth,
        "R": r,
        "S": s,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "GATE": gate_act,
        "HAS_SHIFT": dshift is not None,
        "ADD": part is None,
        "PRECISION": dot_precision(x.dtype),
        "ACC": accumulator(x.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Left alone, ptxas spills a few addresses of wide elements so that one more program fits.
        "maxnreg": 255 if x.element_size() > 2 else None,
    }
    if config.form == "descriptor":
        box_x, box_dy = [1, 1, config.block_k, config.block_n], [1, 1, config.block_k, config.block_m]
        even, odd, shift_even, shift_odd = column_phases(x, stride[1], left)
        _wgrad_descriptor_kernel[(tiles * splits,)](
            describe(even, box_x),
            describe(odd, box_x),
            describe(dy, box_dy),
            describe(dy if gate is None else gate, box_dy),
            *targets,
            length,
            lines,
            filters,
            segments,
            total,
            share,
            top,
            dilation[0],
            shift_even,
            shift_odd,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            DIL_W=dilation[1],
            **options,
        )
    else:
        strides = [spatial_strides(t) for t in (x, dy, dy if gate is None else gate)]
        _wgrad_pointer_kernel[(tiles * splits,)](
            x,
            dy,
            gate,
            *targets,
            length,
            *[v for triple in strides for v in triple],
            h,
            w,
            oh,
            ow,
            pixels,
            filters // groups,
            groups,
            share,
            top,
            left,
            *stride,
            *dilation,
            **options,
        )
    if part is not None:
        rows = power_of_two(splits, 2, 32)
        block = 4096 // rows
        _add_splits_kernel[(triton.cdiv(length, block),)](
            part,
            dw,
            dshift,
            dw.numel(),
            length,
            splits,
            HAS_SHIFT=dshift is not None,
            BLOCK=block,
            ROWS=rows,
        )


def conv2d_wgrad_reference(
    weight_size: Sequence[int],
    x: Tensor,
    dy: Tensor,
    gate: Tensor | None,
    gate_act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """What is added to dw and to dshift, in plain PyTorch."""
    top, bottom, left, right = padding
    dz = dy if gate is None else dy * slope_reference(gate, gate_act)
    x = torch.nn.functional.pad(x, [left, right, top, bottom])
    dw = torch.nn.grad.conv2d_weight(x, tuple(weight_size), dz, tuple(stride), 0, tuple(dilation), groups)  # pyright: ignore
    return dw, dz.sum((0, 2, 3))
