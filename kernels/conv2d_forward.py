"""Fused convolution, one pass over memory:

    y = slope(mask) * act(conv(x, w) * scale + shift + residual)

    conv(x, w)[n, k, i, j] = sum over r, s, c of  x[n, c, i*stride - top + r*dilation, j*stride - left + s*dilation]
                                                  * w[k, c, r, s]

As a matrix product: rows are output pixels, columns the output channels of a group, depth is taps x input channels.
The forward of a network uses act, scale, shift and residual; the data gradient is the same product with turned weights
(`conv2d_dgrad.py`) and uses `mask`, the slope of the activation that made x, applied before dx is written.

For a BatchNorm in training behind it, the epilogue also gives mean and squared deviations of what a tile writes, after
it was rounded: statistics cost no pass over memory of their own.

The left operand is loaded and multiplied as it is: computed in registers (a slope applied to it, say), Triton would let
the next turn of the loop overwrite it under products still in flight (triton-lang/triton#9433, sm_90).

Two kernels. The descriptor form (sm_90) takes a segment of one row of pixels per tile: a filter tap is a shift of its
coordinates and padding is what descriptors return outside the window, so there are no masks, no pointer arithmetic and
no 32-bit overflow. A stride of two reads the even and the odd columns as two windows. The pointer form does everything
else: groups, channels that are not a multiple of 16 bytes, other strides, older chips.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, activate_reference, slope, slope_reference
from .dtypes import accumulator, dot_precision, sum_dtype
from .moments import merge_parts, tile_moments
from .tuning import has_descriptors, matmul_config
from .windows import (
    as_one_row,
    can_describe,
    can_describe_phases,
    column_phases,
    describe,
    is_dense,
    spatial_strides,
)

# Activations whose value and slope need neither exp nor erf.
CHEAP = frozenset({"none", "relu", "relu6", "hardswish"})


@triton.jit
def gemm_columns(
    acc,
    x_desc,
    w_desc,
    n,
    row,
    col,
    col_shift,
    k0,
    dil_h,
    CIN: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    DIL_W: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """acc += the taps s = FIRST, FIRST + STEP, ... of all filter rows."""
    KC: tl.constexpr = (CIN + BK - 1) // BK
    TAPS: tl.constexpr = (S - FIRST + STEP - 1) // STEP
    # One flat loop, so that loads run ahead across taps; a loop per tap would drain the pipeline at each of them.
    for i in range(R * TAPS * KC):
        c0 = (i % KC) * BK
        s = FIRST + (i // KC) % TAPS * STEP
        r = i // KC // TAPS
        col_in = col + (s * DIL_W - FIRST) // STEP + col_shift
        a = x_desc.load([n, row + r * dil_h, col_in, c0]).reshape(BM, BK)
        w = w_desc.load([k0, (r * S + s) * CIN + c0])
        acc = tl.dot(a, w.T, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


# Integers that only place a tile are not specialised: tiles at an image's border run the same code as inner ones.
@triton.jit(do_not_specialize=["OH", "OW", "segments", "top", "shift_even", "shift_odd"])
def _conv2d_descriptor_kernel(
    x_desc,
    x_odd_desc,
    w_desc,  # windows; the odd ones are used for a stride of two
    scale_ptr,
    shift_ptr,  # [COUT]
    residual_desc,
    mask_desc,
    y_desc,
    z_desc,  # maps of the output's size
    mean_ptr,
    m2_ptr,  # [tiles, COUT], of what each tile writes
    OH,
    OW,
    COUT,
    segments,  # output rows and columns, output channels, segments per row
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
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_Z: tl.constexpr,
    ACT: tl.constexpr,
    MASK: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(COUT, BN)
    k0 = (pid % blocks) * BN  # channels first: tiles that read the same pixels run together and share them in L2
    segment = pid // blocks
    j0 = (segment % segments) * BM
    line = segment // segments
    n = line // OH
    i = line % OH

    acc = tl.zeros((BM, BN), ACC)
    acc = gemm_columns(
        acc,
        x_desc,
        w_desc,
        n,
        i * STRIDE_H - top,
        j0,
        shift_even,
        k0,
        dil_h,
        CIN,
        R,
        S,
        0,
        STRIDE_W,
        DIL_W,
        BM,
        BK,
        PRECISION,
        ACC,
    )
    if STRIDE_W == 2 and S > 1:
        acc = gemm_columns(
            acc,
            x_odd_desc,
            w_desc,
            n,
            i * STRIDE_H - top,
            j0,
            shift_odd,
            k0,
            dil_h,
            CIN,
            R,
            S,
            1,
            STRIDE_W,
            DIL_W,
            BM,
            BK,
            PRECISION,
            ACC,
        )

    k = k0 + tl.arange(0, BN)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + k, mask=k < COUT, other=0.0).to(ACC)[None, :]
    if HAS_SHIFT:
        acc += tl.load(shift_ptr + k, mask=k < COUT, other=0.0).to(ACC)[None, :]
    if HAS_RESIDUAL:
        acc += residual_desc.load([n, i, j0, k0]).reshape(BM, BN).to(ACC)
    if HAS_Z:
        z_desc.store([n, i, j0, k0], acc.to(z_desc.dtype).reshape(1, 1, BM, BN))
    y = activate(acc, ACT)
    if MASK != "none":
        y *= slope(mask_desc.load([n, i, j0, k0]).reshape(BM, BN).to(ACC), MASK)
    y = y.to(y_desc.dtype)
    y_desc.store([n, i, j0, k0], y.reshape(1, 1, BM, BN))
    if MOMENTS:
        mean, m2 = tile_moments(y.to(ACC), j0 + tl.arange(0, BM) < OW, tl.minimum(BM, OW - j0), ACC)
        at = segment.to(tl.int64) * COUT + k
        tl.store(mean_ptr + at, mean, mask=k < COUT)
        tl.store(m2_ptr + at, m2, mask=k < COUT)


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW", "top", "left"])
def _conv2d_pointer_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    mask_ptr,
    y_ptr,
    z_ptr,
    mean_ptr,
    m2_ptr,  # [tiles, groups * COUT], of what each tile writes
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,  # strides of image, row, pixel; channels have stride 1
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
    R: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_Z: tl.constexpr,
    ACT: tl.constexpr,
    MASK: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(COUT, BN)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    m = (pid // blocks) * BM + tl.arange(0, BM)  # [BM] output pixels
    k = (pid % blocks) * BN + tl.arange(0, BN)  # [BN] output channels within the group
    n, i, j = m // (OH * OW), m // OW % OH, m % OW
    inside, wanted = n < N, k < COUT
    n = n.to(tl.int64)

    acc = tl.zeros((BM, BN), ACC)
    depth = tl.cdiv(CIN, BK)
    for t in range(R * S * depth):
        c = (t % depth) * BK + tl.arange(0, BK)
        rs = t // depth
        h, w = i * stride_h - top + rs // S * dil_h, j * stride_w - left + rs % S * dil_w
        hit = (inside & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & (c < CIN)[None, :]
        pixel = n * x_sn + h.to(tl.int64) * x_sh + w.to(tl.int64) * x_sw + group * CIN
        a = tl.load(x_ptr + pixel[:, None] + c[None, :], mask=hit, other=0.0)
        filters = (group * COUT + k) * (R * S * CIN) + rs * CIN
        b = tl.load(w_ptr + filters[None, :] + c[:, None], mask=(c < CIN)[:, None] & wanted[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    channel = group * COUT + k
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + channel, mask=wanted, other=0.0).to(ACC)[None, :]
    if HAS_SHIFT:
        acc += tl.load(shift_ptr + channel, mask=wanted, other=0.0).to(ACC)[None, :]
    keep = inside[:, None] & wanted[None, :]
    i, j = i.to(tl.int64), j.to(tl.int64)
    if HAS_RESIDUAL:
        at = (n * r_sn + i * r_sh + j * r_sw)[:, None] + channel[None, :]
        acc += tl.load(residual_ptr + at, mask=keep, other=0.0).to(ACC)
    if HAS_Z:
        at = (n * z_sn + i * z_sh + j * z_sw)[:, None] + channel[None, :]
        tl.store(z_ptr + at, acc.to(z_ptr.dtype.element_ty), mask=keep)
    y = activate(acc, ACT)
    if MASK != "none":
        at = (n * m_sn + i * m_sh + j * m_sw)[:, None] + channel[None, :]
        y *= slope(tl.load(mask_ptr + at, mask=keep, other=0.0).to(ACC), MASK)
    at = (n * y_sn + i * y_sh + j * y_sw)[:, None] + channel[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=keep)
    if MOMENTS:
        mean, m2 = tile_moments(y.to(ACC), inside, tl.minimum(BM, N * OH * OW - pid // blocks * BM), ACC)
        at = (pid // blocks).to(tl.int64) * (tl.num_programs(1) * COUT) + channel
        tl.store(mean_ptr + at, mean, mask=wanted)
        tl.store(m2_ptr + at, m2, mask=wanted)


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: tuple[int, int],
    padding: Sequence[int],
    dilation: tuple[int, int],
    groups: int,
    act: str,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    mask: Tensor | None = None,
    mask_act: str = "none",
    moments: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Write y, and z if given (what the activation is applied to); see the formula above.

    With `moments` mean and sum of squared deviations of each channel of y are returned, as `moments.moments(y)` would:
    (K,) in float32 (float64 for float64).

    Args:
        x: (N, C, H, W) window.
        weight: (K, C / groups, R, S) in channels-last memory.
        y: (N, K, OH, OW) window to be written.
        padding: (top, bottom, left, right) rows and columns of zeros around x.
        scale, shift: (K,).
        residual, z, mask: windows of y's size. `mask_act` says whose slope `mask` gives.
    """
    n, channels, h, w = x.shape
    filters, depth, r, s = weight.shape
    _, _, oh, ow = y.shape
    if not y.numel():
        none = y.new_zeros(filters, dtype=sum_dtype(y.dtype))
        return (none, none.clone()) if moments else None
    top, left = padding[0], padding[2]
    maps = (x, y, residual, z, mask)
    matrix = weight.permute(0, 2, 3, 1).reshape(filters, r * s * depth)
    described = (
        has_descriptors(x.device)
        and groups == 1
        and stride[1] in (1, 2)
        and (stride[1] == 1 or dilation[1] % 2 == 1)
        and can_describe(*maps, matrix)
        and (stride[1] == 1 or can_describe_phases(x))
    )
    images, lines, run = n, oh, ow
    if described and r == s == 1 and stride == (1, 1) and not any(padding) and all(map(is_dense, maps)):
        x, y, residual, z, mask = (None if t is None else as_one_row(t) for t in maps)  # pyright: ignore
        images, lines, run = 1, 1, n * oh * ow
    config = matmul_config(
        x.device,
        x.dtype,
        run if described else n * oh * ow,
        filters // groups,
        depth,
        described,
        1 + sum(t is not None for t in (residual, z, mask)),
        r * s,
        not {act, mask_act} <= CHEAP,
    )
    options = {
        "R": r,
        "S": s,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None,
        "HAS_RESIDUAL": residual is not None,
        "HAS_Z": z is not None,
        "ACT": act,
        "MASK": mask_act,
        "MOMENTS": moments,
        "PRECISION": dot_precision(x.dtype),
        "ACC": accumulator(x.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

    def parts(tiles: int) -> Tensor:
        return torch.empty(2, tiles if moments else 0, filters, dtype=sum_dtype(y.dtype), device=y.device)

    if config.form == "descriptor":
        box_a, box_y = [1, 1, config.block_m, config.block_k], [1, 1, config.block_m, config.block_n]
        even, odd, shift_even, shift_odd = column_phases(x, stride[1], left)
        x_desc, y_desc = describe(even, box_a), describe(y, box_y)
        x_odd_desc = x_desc if stride[1] == 1 else describe(odd, box_a)
        segments = triton.cdiv(run, config.block_m)
        sums = parts(images * lines * segments)
        _conv2d_descriptor_kernel[(images * lines * segments * triton.cdiv(filters, config.block_n),)](
            x_desc,
            x_odd_desc,
            describe(matrix, [config.block_n, config.block_k]),
            scale,
            shift,
            y_desc if residual is None else describe(residual, box_y),
            y_desc if mask is None else describe(mask, box_y),
            y_desc,
            y_desc if z is None else describe(z, box_y),
            *sums,
            lines,
            run,
            filters,
            segments,
            top,
            dilation[0],
            shift_even,
            shift_odd,
            CIN=depth,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            DIL_W=dilation[1],
            **options,
        )
        return merge_parts(sums, config.block_m, run) if moments else None
    if n * oh * ow + config.block_m >= 2**31:
        raise ValueError(
            f"conv2d: an output of {n} x {oh} x {ow} pixels is too large for the pointer form; use smaller tiles"
        )
    strides = [spatial_strides(y if t is None else t) for t in (x, residual, mask, y, z)]
    grid = (triton.cdiv(n * oh * ow, config.block_m) * triton.cdiv(filters // groups, config.block_n), groups)
    sums = parts(triton.cdiv(n * oh * ow, config.block_m))
    _conv2d_pointer_kernel[grid](
        x,
        matrix,
        scale,
        shift,
        residual,
        mask,
        y,
        z,
        *sums,
        *[v for triple in strides for v in triple],
        n,
        h,
        w,
        oh,
        ow,
        channels // groups,
        filters // groups,
        top,
        left,
        *stride,
        *dilation,
        **options,
    )
    return merge_parts(sums, config.block_m, n * oh * ow) if moments else None


def conv2d_forward_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    mask: Tensor | None = None,
    mask_act: str = "none",
) -> tuple[Tensor, Tensor]:
    """y and z in plain PyTorch."""
    top, bottom, left, right = padding
    z = F.conv2d(F.pad(x, [left, right, top, bottom]), weight, None, tuple(stride), 0, tuple(dilation), groups)
    if scale is not None:
        z = z * scale.reshape(-1, 1, 1)
    if shift is not None:
        z = z + shift.reshape(-1, 1, 1)
    if residual is not None:
        z = z + residual
    y = activate_reference(z, act)
    return (y if mask is None else y * slope_reference(mask, mask_act)), z
