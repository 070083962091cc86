"""The two kernels of the fused convolution (see `conv2d_forward.py`) and its matrix product.

The left operand is multiplied as loaded: if it were computed in registers (by a slope, for example), Triton would let
the next iteration overwrite it during products in flight (triton-lang/triton#9433, sm_90).

The descriptor form (sm_90) has a box of rows and columns of pixels per tile. A filter tap is a shift of its
coordinates, and descriptors return the padding outside the window, so there are no masks, no pointer arithmetic and no
32-bit overflow. A stride of two reads even and odd rows and columns as four windows. The pointer form does everything
else: groups, channels that are not a multiple of 16 bytes, other strides, older chips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, slope
from .dtypes import accumulator
from .moments import tile_moments
from .precision import dot_precision
from .stream import map_offsets
from .triton_private import jit_kernel
from .tuning import Config
from .windows import ConvGeometry


class Product(NamedTuple):
    """Compile-time constants: the filter; pixels, filters, channels, rows, parts of a tile; precision of products."""

    R: int
    S: int
    BM: int
    BN: int
    BK: int
    ROWS: int
    PARTS: int
    PRECISION: str
    ACC: tl.dtype

    @classmethod
    def of(cls, kernel: tuple[int, int], config: Config, dtype: torch.dtype) -> Product:
        blocks = config.block_m, config.block_n, config.block_k, config.rows, config.parts
        return cls(*kernel, *blocks, dot_precision(dtype), accumulator(dtype))


def product_options(kernel: tuple[int, int], config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The launch options of a kernel with a matrix product."""
    product = Product.of(kernel, config, dtype)
    return {"P": product, "num_warps": config.num_warps, "num_stages": config.num_stages}


class FilterFlip(NamedTuple):
    """Filters of another convolution, read with inputs and outputs exchanged and taps in descending order.

    Tap (r, s) is tap (ROW - r*ROW_STEP, COL - s*COL_STEP) of the filters, with WIDTH taps of COUT channels per row.
    """

    ROW: int
    ROW_STEP: int
    COL: int
    COL_STEP: int
    WIDTH: int
    COUT: int

    @classmethod
    def of(cls, rows: Sequence[int], cols: Sequence[int], weight: Tensor) -> FilterFlip:
        """The flip for the given taps, in descending order, of filters (CIN, COUT, rows, columns)."""
        steps = [taps[0] - taps[1] if len(taps) > 1 else 1 for taps in (rows, cols)]
        whole = weight.shape[3], weight.shape[1]
        alone = max(rows) == max(cols) == 0  # then they are unused: one compiled kernel for all sizes
        return cls(rows[0], steps[0], cols[0], steps[1], *((1, 1) if alone else whole))


class Steps(NamedTuple):
    """Compile-time constants: steps from one output or tap to the next, and the flip of filters."""

    STRIDE_H: int
    STRIDE_W: int
    DIL_W: int
    FLIP: FilterFlip | None = None

    @classmethod
    def of(cls, kernel: tuple[int, int], geometry: ConvGeometry, flip: FilterFlip | None = None) -> Steps:
        """The steps; one along an axis of one tap, where they are unused: one compiled kernel for all strides."""
        (r, s), (down, across) = kernel, geometry.stride
        return cls(down if r > 1 else 1, across if s > 1 else 1, geometry.dilation_w if s > 1 else 1, flip)


@triton.jit
def _gemm_phase(
    acc,
    x_desc,
    w_desc,
    n,
    row,
    col,
    k0,
    dil_h,
    FIRST_R: tl.constexpr,
    FIRST_S: tl.constexpr,
    CIN: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
):
    """acc += the taps r = FIRST_R, FIRST_R + stride, ... and s likewise; tap 0 of the phase is at `row`, `col`."""
    KC: tl.constexpr = (CIN + P.BK - 1) // P.BK
    ROWS: tl.constexpr = (P.R - FIRST_R + STEPS.STRIDE_H - 1) // STEPS.STRIDE_H
    TAPS: tl.constexpr = (P.S - FIRST_S + STEPS.STRIDE_W - 1) // STEPS.STRIDE_W
    # One flat loop, so that loads are prefetched across taps; a loop per tap would drain the pipeline at each of them.
    for t in range(ROWS * TAPS * KC):
        c0 = (t % KC) * P.BK
        s = FIRST_S + (t // KC) % TAPS * STEPS.STRIDE_W
        r = FIRST_R + t // KC // TAPS * STEPS.STRIDE_H
        row_in = row + (r * dil_h - FIRST_R) // STEPS.STRIDE_H
        col_in = col + (s * STEPS.DIL_W - FIRST_S) // STEPS.STRIDE_W
        a = x_desc.load([n, row_in, col_in, c0]).reshape(P.BM, P.BK)
        if STEPS.FLIP is None:
            w = w_desc.load([k0, (r * P.S + s) * CIN + c0]).T
        else:
            T: tl.constexpr = STEPS.FLIP
            w = w_desc.load([c0, ((T.ROW - r * T.ROW_STEP) * T.WIDTH + T.COL - s * T.COL_STEP) * T.COUT + k0])
        if P.ROWS == 1:
            acc = tl.dot(a, w, acc, input_precision=P.PRECISION, out_dtype=P.ACC)
        else:  # a reshaped left operand would pass through registers
            acc = tl.dot(w.T, a.T, acc, input_precision=P.PRECISION, out_dtype=P.ACC)
    return acc


@triton.jit
def gemm(
    x,  # [N, H, W, C] windows: see `Phases`
    w_desc,  # [COUT, R*S*CIN], or to flip [CIN, all taps * COUT]
    n,
    i,
    j,
    shifts,
    k0,
    dil_h,
    WIDTH: tl.constexpr,
    CIN: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
):
    """conv(x, w) of a box of pixels from row i and column j on, and WIDTH filters from k0 on."""
    BM: tl.constexpr = P.BM
    ODD_W: tl.constexpr = STEPS.STRIDE_W == 2 and P.S > 1
    acc = tl.zeros((BM, WIDTH) if P.ROWS == 1 else (WIDTH, BM), P.ACC)
    acc = _gemm_phase(acc, x[0], w_desc, n, i + shifts[0], j + shifts[2], k0, dil_h, 0, 0, CIN, STEPS, P)
    if ODD_W:
        acc = _gemm_phase(acc, x[1], w_desc, n, i + shifts[0], j + shifts[3], k0, dil_h, 0, 1, CIN, STEPS, P)
    if STEPS.STRIDE_H == 2 and P.R > 1:
        acc = _gemm_phase(acc, x[2], w_desc, n, i + shifts[1], j + shifts[2], k0, dil_h, 1, 0, CIN, STEPS, P)
        if ODD_W:
            acc = _gemm_phase(acc, x[3], w_desc, n, i + shifts[1], j + shifts[3], k0, dil_h, 1, 1, CIN, STEPS, P)
    return acc if P.ROWS == 1 else acc.T


@triton.jit
def _sloped(z, mask, ACT: tl.constexpr, MASK: tl.constexpr):
    """act(z) times the slope from the mask; if the mask is the gradient of act(z), the gradient of z."""
    if MASK == "gradient":
        return mask * slope(z, ACT)
    return activate(z, ACT) * slope(mask, MASK)


@triton.jit
def _finish(
    acc, n, i, j0, k0, at, segment, OH, OW, COUT, maps, vectors, ACT: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr
):
    """The epilogue of a box's pixels [BM, filters], from filter k0 on."""
    residual_desc, mask_desc, y_desc, z_desc = maps
    top, left = at
    shift_ptr, mean_ptr, m2_ptr = vectors
    COLS: tl.constexpr = P.BM // P.ROWS
    BM: tl.constexpr = P.BM
    WIDTH: tl.constexpr = P.BN // P.PARTS
    k = k0 + tl.arange(0, WIDTH)
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + k, mask=k < COUT, other=0.0).to(P.ACC)[None, :]
    if residual_desc is not None:
        acc += residual_desc.load([n, i - top, j0 - left, k0]).reshape(BM, WIDTH).to(P.ACC)
    if z_desc is not None:
        z_desc.store([n, i, j0, k0], acc.to(z_desc.dtype).reshape(1, P.ROWS, COLS, WIDTH))
    if mask_desc is None:
        y = activate(acc, ACT)
    else:
        y = _sloped(acc, mask_desc.load([n, i, j0, k0]).reshape(BM, WIDTH).to(P.ACC), ACT, MASK)
    y = y.to(y_desc.dtype)
    y_desc.store([n, i, j0, k0], y.reshape(1, P.ROWS, COLS, WIDTH))
    if mean_ptr is not None:
        m = tl.arange(0, BM)
        inside = (i + m // COLS < OH) & (j0 + m % COLS < OW)
        count = tl.minimum(P.ROWS, OH - i) * tl.minimum(COLS, OW - j0)
        mean, m2 = tile_moments(y.to(P.ACC), inside, count, P.ACC)
        at = segment.to(tl.int64) * COUT + k
        tl.store(mean_ptr + at, mean, mask=k < COUT)
        tl.store(m2_ptr + at, m2, mask=k < COUT)


# Integers that only locate a tile are not specialised: tiles at an image's border run the same code as inner ones.
_POSITIONS = "OH OW lines segments row_even row_odd col_even col_odd residual_top residual_left".split()


@jit_kernel(_POSITIONS)
def conv2d_descriptor_kernel(
    x_desc,  # [N, H, W, CIN] window
    x01_desc,
    x10_desc,
    x11_desc,  # with a stride of two, x_desc has the even rows and columns, these the odd columns, odd rows and both
    w_desc,  # [COUT, R*S*CIN], or to flip [CIN, all taps * COUT]
    residual_desc,  # [N, rows, columns, COUT] window or None
    mask_desc,  # [N, OH, OW, COUT] window or None
    y_desc,  # [N, OH, OW, COUT] window
    z_desc,  # [N, OH, OW, COUT] window or None
    shift_ptr,  # [COUT] or None
    mean_ptr,  # [tiles, COUT] or None: moments of each tile's output
    m2_ptr,  # [tiles, COUT] or None
    OH,
    OW,
    COUT,
    lines,  # boxes in vertical direction
    segments,  # boxes in horizontal direction
    dil_h,
    row_even,
    row_odd,
    col_even,
    col_odd,  # offsets of the phases' first taps from an output
    residual_top,
    residual_left,  # position of the residual in y; it is zero elsewhere
    ACT: tl.constexpr,
    MASK: tl.constexpr,
    CIN: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
):
    """y of a box of ROWS x BM / ROWS pixels and BN filters."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(COUT, P.BN)
    k0 = (pid % blocks) * P.BN  # channels first: tiles that read the same pixels run together and share L2
    segment = pid // blocks
    COLS: tl.constexpr = P.BM // P.ROWS
    j0 = (segment % segments) * COLS
    line = segment // segments
    n = line // lines
    i = (line % lines) * P.ROWS
    x = (x_desc, x01_desc, x10_desc, x11_desc)
    acc = gemm(x, w_desc, n, i, j0, (row_even, row_odd, col_even, col_odd), k0, dil_h, P.BN, CIN, STEPS, P)
    maps = (residual_desc, mask_desc, y_desc, z_desc)
    vectors = (shift_ptr, mean_ptr, m2_ptr)
    at = (residual_top, residual_left)
    if P.PARTS == 1:
        _finish(acc, n, i, j0, k0, at, segment, OH, OW, COUT, maps, vectors, ACT, MASK, P)
    else:  # one half after the other: both halves and their loaded values would not fit in registers together
        half: tl.constexpr = P.BN // 2
        BM: tl.constexpr = P.BM
        first, second = acc.reshape(BM, 2, half).permute(0, 2, 1).split()
        _finish(first, n, i, j0, k0, at, segment, OH, OW, COUT, maps, vectors, ACT, MASK, P)
        _finish(second, n, i, j0, k0 + half, at, segment, OH, OW, COUT, maps, vectors, ACT, MASK, P)


@triton.jit
def _by_taps(x, w_ptr, n, i, j, inside, first, k, wanted, H, W, CIN, dil_h, dil_w, P: tl.constexpr):
    """conv(x, w) of pixels [BM] and filters k [BN], channels from `first` on; tap 0 is at rows i and columns j."""
    BM: tl.constexpr = P.BM
    BN: tl.constexpr = P.BN
    acc = tl.zeros((BM, BN), P.ACC)
    depth = tl.cdiv(CIN, P.BK)
    for t in range(P.R * P.S * depth):
        c = (t % depth) * P.BK + tl.arange(0, P.BK)
        rs = t // depth
        h, w = i + rs // P.S * dil_h, j + rs % P.S * dil_w
        hit = (inside & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & (c < CIN)[None, :]
        pixel = map_offsets(x, n, h.to(tl.int64), w.to(tl.int64), 1) + first
        a = tl.load(x.ptr + pixel[:, None] + c[None, :], mask=hit, other=0.0)
        filters = k * (P.R * P.S * CIN) + rs * CIN
        b = tl.load(w_ptr + filters[None, :] + c[:, None], mask=(c < CIN)[:, None] & wanted[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=P.PRECISION, out_dtype=P.ACC)
    return acc


@triton.jit
def _by_columns(x, w_ptr, n, i, j, inside, first, k, wanted, H, W, dil_h, dil_w, CIN: tl.constexpr, P: tl.constexpr):
    """conv(x, w) by columns (r * S + s) * CIN + c of the flattened filter; w is padded with zeros to whole steps.

    x is loaded as [BK, BM], so that the threads of a warp read neighbouring pixels: fewer cache lines and registers.
    """
    BM: tl.constexpr = P.BM
    BN: tl.constexpr = P.BN
    COLUMNS: tl.constexpr = P.R * P.S * CIN
    STEPS: tl.constexpr = (COLUMNS + P.BK - 1) // P.BK
    acc = tl.zeros((BM, BN), P.ACC)
    pixel = map_offsets(x, n, i.to(tl.int64), j.to(tl.int64), 1) + first
    for t in range(STEPS):
        column = t * P.BK + tl.arange(0, P.BK)
        tap = column // CIN
        dh, dw = tap // P.S * dil_h, tap % P.S * dil_w
        shift = dh.to(tl.int64) * x.sh + dw.to(tl.int64) * x.sw + column % CIN
        h, w = i[None, :] + dh[:, None], j[None, :] + dw[:, None]
        hit = (h >= 0) & (h < H) & (w >= 0) & (w < W) & inside[None, :] & (column < COLUMNS)[:, None]
        a = tl.load(x.ptr + pixel[None, :] + shift[:, None], mask=hit, other=0.0)
        b = tl.load(w_ptr + (k * (STEPS * P.BK))[None, :] + column[:, None], mask=wanted[None, :], other=0.0)
        acc = tl.dot(a.T, b, acc, input_precision=P.PRECISION, out_dtype=P.ACC)
    return acc


@jit_kernel(["N", "H", "W", "OH", "OW", "top", "left"])
def conv2d_pointer_kernel(
    x,  # map [N, groups * CIN, H, W]
    w_ptr,  # [groups * COUT, R*S*CIN]
    residual,  # map [N, groups * COUT, OH, OW] or None
    mask,  # map [N, groups * COUT, OH, OW] or None
    y,  # map [N, groups * COUT, OH, OW]
    z,  # map [N, groups * COUT, OH, OW] or None
    shift_ptr,  # [groups * COUT] or None
    mean_ptr,  # [tiles, groups * COUT] or None: moments of each tile's output
    m2_ptr,  # [tiles, groups * COUT] or None
    N,
    H,
    W,
    OH,
    OW,
    CIN,
    COUT,  # CIN, COUT: channels of one group
    top,
    left,
    stride_h,
    stride_w,
    dil_h,
    dil_w,
    FEW: tl.constexpr,  # CIN if products use columns of the flattened filter, else None
    ACT: tl.constexpr,
    MASK: tl.constexpr,
    P: tl.constexpr,
):
    """y of BM pixels and BN filters of one group."""
    blocks = tl.cdiv(COUT, P.BN)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    m = (pid // blocks) * P.BM + tl.arange(0, P.BM)  # [BM] output pixels
    k = (pid % blocks) * P.BN + tl.arange(0, P.BN)  # [BN] output channels within the group
    i, j = m // OW, m % OW
    n = i // OH
    i -= n * OH  # avoids a second division: sm_80 has no spare register
    inside, wanted = n < N, k < COUT
    n = n.to(tl.int64)

    channel = group * COUT + k
    h, w = i * stride_h - top, j * stride_w - left
    if FEW is None:
        acc = _by_taps(x, w_ptr, n, h, w, inside, group * CIN, channel, wanted, H, W, CIN, dil_h, dil_w, P)
    else:
        acc = _by_columns(x, w_ptr, n, h, w, inside, group * FEW, channel, wanted, H, W, dil_h, dil_w, FEW, P)

    if shift_ptr is not None:
        acc += tl.load(shift_ptr + channel, mask=wanted, other=0.0).to(P.ACC)[None, :]
    keep = inside[:, None] & wanted[None, :]
    i, j = i.to(tl.int64), j.to(tl.int64)
    if residual.ptr is not None:
        at = map_offsets(residual, n, i, j, 1)[:, None] + channel[None, :]
        acc += tl.load(residual.ptr + at, mask=keep, other=0.0).to(P.ACC)
    if z.ptr is not None:
        at = map_offsets(z, n, i, j, 1)[:, None] + channel[None, :]
        tl.store(z.ptr + at, acc.to(z.ptr.dtype.element_ty), mask=keep)
    if mask.ptr is None:
        values = activate(acc, ACT)
    else:
        at = map_offsets(mask, n, i, j, 1)[:, None] + channel[None, :]
        values = _sloped(acc, tl.load(mask.ptr + at, mask=keep, other=0.0).to(P.ACC), ACT, MASK)
    at = map_offsets(y, n, i, j, 1)[:, None] + channel[None, :]
    values = values.to(y.ptr.dtype.element_ty)
    tl.store(y.ptr + at, values, mask=keep)
    if mean_ptr is not None:
        mean, m2 = tile_moments(values.to(P.ACC), inside, tl.minimum(P.BM, N * OH * OW - pid // blocks * P.BM), P.ACC)
        at = (pid // blocks).to(tl.int64) * (tl.num_programs(1) * COUT) + channel
        tl.store(mean_ptr + at, mean, mask=wanted)
        tl.store(m2_ptr + at, m2, mask=wanted)
