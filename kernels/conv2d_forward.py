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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, activate_reference, slope, slope_reference
from .dtypes import accumulator, sum_dtype
from .moments import merge_parts, tile_moments
from .precision import dot_precision
from .stream import as_map, place
from .tuning import Config, matmul_config
from .windows import ConvGeometry, as_one_row, can_describe_product, column_phases, describe, is_dense

# Activations whose value and slope need neither exp nor erf.
CHEAP = frozenset({"none", "relu", "relu6", "hardswish"})


class Product(NamedTuple):
    """Known when compiled: the filter; pixels, filters and channels of a tile; how products are computed."""

    R: int
    S: int
    BM: int
    BN: int
    BK: int
    PRECISION: str
    ACC: tl.dtype

    @classmethod
    def of(cls, kernel: tuple[int, int], config: Config, dtype: torch.dtype) -> Product:
        blocks = config.block_m, config.block_n, config.block_k
        return cls(*kernel, *blocks, dot_precision(dtype), accumulator(dtype))


class Steps(NamedTuple):
    """Known when compiled: input channels, and steps from one output or tap to the next."""

    CIN: int
    STRIDE_H: int
    STRIDE_W: int
    DIL_W: int


@triton.jit
def _gemm_columns(
    acc,
    x_desc,
    w_desc,
    n,
    row,
    col,
    k0,
    dil_h,
    FIRST: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
):
    """acc += the taps s = FIRST, FIRST + stride, ... of all filter rows; tap 0 lies at `row`, `col`."""
    KC: tl.constexpr = (STEPS.CIN + P.BK - 1) // P.BK
    TAPS: tl.constexpr = (P.S - FIRST + STEPS.STRIDE_W - 1) // STEPS.STRIDE_W
    # One flat loop, so that loads run ahead across taps; a loop per tap would drain the pipeline at each of them.
    for t in range(P.R * TAPS * KC):
        c0 = (t % KC) * P.BK
        s = FIRST + (t // KC) % TAPS * STEPS.STRIDE_W
        r = t // KC // TAPS
        col_in = col + (s * STEPS.DIL_W - FIRST) // STEPS.STRIDE_W
        a = x_desc.load([n, row + r * dil_h, col_in, c0]).reshape(P.BM, P.BK)
        w = w_desc.load([k0, (r * P.S + s) * STEPS.CIN + c0])
        acc = tl.dot(a, w.T, acc, input_precision=P.PRECISION, out_dtype=P.ACC)
    return acc


@triton.jit
def gemm(
    x_desc,  # [N, H, W, C] window; with a stride of two its even columns
    x_odd_desc,  # the odd columns
    w_desc,  # [COUT, R*S*CIN]
    n,
    row,
    j0,
    shift_even,
    shift_odd,
    k0,
    dil_h,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
):
    """conv(x, w) of BM pixels from column j0 and WIDTH filters from k0; row of tap 0, column shift of each phase."""
    BM: tl.constexpr = P.BM
    acc = tl.zeros((BM, WIDTH), P.ACC)
    acc = _gemm_columns(acc, x_desc, w_desc, n, row, j0 + shift_even, k0, dil_h, 0, STEPS, P)
    if STEPS.STRIDE_W == 2 and P.S > 1:
        acc = _gemm_columns(acc, x_odd_desc, w_desc, n, row, j0 + shift_odd, k0, dil_h, 1, STEPS, P)
    return acc


# Integers that only place a tile are not specialised: tiles at an image's border run the same code as inner ones.
@triton.jit(do_not_specialize=["OH", "OW", "segments", "top", "shift_even", "shift_odd"])
def _conv2d_descriptor_kernel(
    x_desc,  # [N, H, W, CIN] window; with a stride of two its even columns
    x_odd_desc,  # the odd columns
    w_desc,  # [COUT, R*S*CIN]
    residual_desc,  # [N, OH, OW, COUT] window or None
    mask_desc,  # [N, OH, OW, COUT] window or None
    y_desc,  # [N, OH, OW, COUT] window
    z_desc,  # [N, OH, OW, COUT] window or None
    scale_ptr,  # [COUT] or None
    shift_ptr,  # [COUT] or None
    mean_ptr,  # [tiles, COUT] or None: of what each tile writes
    m2_ptr,  # [tiles, COUT] or None
    OH,
    OW,
    COUT,
    segments,  # of a row
    top,
    dil_h,
    shift_even,
    shift_odd,  # row of tap 0 is i*stride - top; column shifts of the two column phases
    ACT: tl.constexpr,
    MASK: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
):
    """y of BM pixels of one row and BN filters."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(COUT, P.BN)
    k0 = (pid % blocks) * P.BN  # channels first: tiles that read the same pixels run together and share them in L2
    segment = pid // blocks
    j0 = (segment % segments) * P.BM
    line = segment // segments
    n = line // OH
    i = line % OH
    row = i * STEPS.STRIDE_H - top
    acc = gemm(x_desc, x_odd_desc, w_desc, n, row, j0, shift_even, shift_odd, k0, dil_h, P.BN, STEPS, P)

    k = k0 + tl.arange(0, P.BN)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + k, mask=k < COUT, other=0.0).to(P.ACC)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + k, mask=k < COUT, other=0.0).to(P.ACC)[None, :]
    if residual_desc is not None:
        acc += residual_desc.load([n, i, j0, k0]).reshape(P.BM, P.BN).to(P.ACC)
    if z_desc is not None:
        z_desc.store([n, i, j0, k0], acc.to(z_desc.dtype).reshape(1, 1, P.BM, P.BN))
    y = activate(acc, ACT)
    if mask_desc is not None:
        y *= slope(mask_desc.load([n, i, j0, k0]).reshape(P.BM, P.BN).to(P.ACC), MASK)
    y = y.to(y_desc.dtype)
    y_desc.store([n, i, j0, k0], y.reshape(1, 1, P.BM, P.BN))
    if mean_ptr is not None:
        mean, m2 = tile_moments(y.to(P.ACC), j0 + tl.arange(0, P.BM) < OW, tl.minimum(P.BM, OW - j0), P.ACC)
        at = segment.to(tl.int64) * COUT + k
        tl.store(mean_ptr + at, mean, mask=k < COUT)
        tl.store(m2_ptr + at, m2, mask=k < COUT)


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW", "top", "left"])
def _conv2d_pointer_kernel(
    x,  # map [N, groups * CIN, H, W]
    w_ptr,  # [groups * COUT, R*S*CIN]
    residual,  # map [N, groups * COUT, OH, OW] or None
    mask,  # map [N, groups * COUT, OH, OW] or None
    y,  # map [N, groups * COUT, OH, OW]
    z,  # map [N, groups * COUT, OH, OW] or None
    scale_ptr,  # [groups * COUT] or None
    shift_ptr,  # [groups * COUT] or None
    mean_ptr,  # [tiles, groups * COUT] or None: of what each tile writes
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
    i -= n * OH  # not a second division: sm_80 has no register to spare
    inside, wanted = n < N, k < COUT
    n = n.to(tl.int64)

    BM: tl.constexpr = P.BM
    BN: tl.constexpr = P.BN
    acc = tl.zeros((BM, BN), P.ACC)
    depth = tl.cdiv(CIN, P.BK)
    for t in range(P.R * P.S * depth):
        c = (t % depth) * P.BK + tl.arange(0, P.BK)
        rs = t // depth
        h, w = i * stride_h - top + rs // P.S * dil_h, j * stride_w - left + rs % P.S * dil_w
        hit = (inside & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & (c < CIN)[None, :]
        pixel = place(x, n, h.to(tl.int64), w.to(tl.int64), 1) + group * CIN
        a = tl.load(x.ptr + pixel[:, None] + c[None, :], mask=hit, other=0.0)
        filters = (group * COUT + k) * (P.R * P.S * CIN) + rs * CIN
        b = tl.load(w_ptr + filters[None, :] + c[:, None], mask=(c < CIN)[:, None] & wanted[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=P.PRECISION, out_dtype=P.ACC)

    channel = group * COUT + k
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + channel, mask=wanted, other=0.0).to(P.ACC)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + channel, mask=wanted, other=0.0).to(P.ACC)[None, :]
    keep = inside[:, None] & wanted[None, :]
    i, j = i.to(tl.int64), j.to(tl.int64)
    if residual.ptr is not None:
        at = place(residual, n, i, j, 1)[:, None] + channel[None, :]
        acc += tl.load(residual.ptr + at, mask=keep, other=0.0).to(P.ACC)
    if z.ptr is not None:
        at = place(z, n, i, j, 1)[:, None] + channel[None, :]
        tl.store(z.ptr + at, acc.to(z.ptr.dtype.element_ty), mask=keep)
    values = activate(acc, ACT)
    if mask.ptr is not None:
        at = place(mask, n, i, j, 1)[:, None] + channel[None, :]
        values *= slope(tl.load(mask.ptr + at, mask=keep, other=0.0).to(P.ACC), MASK)
    at = place(y, n, i, j, 1)[:, None] + channel[None, :]
    values = values.to(y.ptr.dtype.element_ty)
    tl.store(y.ptr + at, values, mask=keep)
    if mean_ptr is not None:
        mean, m2 = tile_moments(values.to(P.ACC), inside, tl.minimum(P.BM, N * OH * OW - pid // blocks * P.BM), P.ACC)
        at = (pid // blocks).to(tl.int64) * (tl.num_programs(1) * COUT) + channel
        tl.store(mean_ptr + at, mean, mask=wanted)
        tl.store(m2_ptr + at, m2, mask=wanted)


def launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: ConvGeometry,
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
        scale, shift: (K,).
        residual, z, mask: windows of y's size. `mask_act` says whose slope `mask` gives.
    """
    filters, depth, r, s = weight.shape
    images, _, lines, run = y.shape
    pixels = images * lines * run
    if not y.numel():
        none = y.new_zeros(filters, dtype=sum_dtype(y.dtype))
        return (none, none.clone()) if moments else None
    maps = (x, y, residual, z, mask)
    matrix = weight.permute(0, 2, 3, 1).reshape(filters, r * s * depth)
    described = can_describe_product(x, geometry, y, residual, z, mask, matrix)
    if described and geometry.is_pixelwise((r, s)) and all(map(is_dense, maps)):
        x, y, residual, z, mask = (None if t is None else as_one_row(t) for t in maps)  # pyright: ignore
        run = pixels
    config = matmul_config(
        x.device,
        x.dtype,
        run if described else pixels,
        filters // geometry.groups,
        depth,
        described,
        1 + sum(t is not None for t in (residual, z, mask)),
        r * s,
        not {act, mask_act} <= CHEAP,
        pixels // run,
    )
    options = {
        "ACT": act,
        "MASK": mask_act,
        "P": Product.of((r, s), config, x.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    run_form = _by_descriptors if config.form == "descriptor" else _by_pointers
    return run_form(_Work(x, matrix, residual, mask, y, z, scale, shift, depth, geometry, config, moments, options))


class _Work(NamedTuple):
    """A convolution as both forms of the kernel take it; `launch` says what its parts are."""

    x: Tensor
    matrix: Tensor  # filters [K, taps x channels]
    residual: Tensor | None
    mask: Tensor | None
    y: Tensor
    z: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    depth: int  # input channels of a group
    geometry: ConvGeometry
    config: Config
    moments: bool
    options: dict[str, Any]

    def sums(self, tiles: int) -> Tensor | None:
        """Room for mean and squared deviations of each tile and filter, if they are wanted."""
        if not self.moments:
            return None
        return torch.empty(2, tiles, self.y.shape[1], dtype=sum_dtype(self.y.dtype), device=self.y.device)


def _by_descriptors(work: _Work) -> tuple[Tensor, Tensor] | None:
    config, geometry, x = work.config, work.geometry, work.x
    images, filters, lines, run = work.y.shape
    box_x, box_y = [1, 1, config.block_m, config.block_k], [1, 1, config.block_m, config.block_n]
    even, odd, shift_even, shift_odd = column_phases(x, geometry.stride_w, geometry.left)
    x_desc = describe(even, box_x, operand=True)
    segments = triton.cdiv(run, config.block_m)
    sums = work.sums(images * lines * segments)
    _conv2d_descriptor_kernel[(images * lines * segments * triton.cdiv(filters, config.block_n),)](
        x_desc,
        x_desc if geometry.stride_w == 1 else describe(odd, box_x, operand=True),
        describe(work.matrix, [config.block_n, config.block_k], operand=True),
        *(None if t is None else describe(t, box_y) for t in (work.residual, work.mask, work.y, work.z)),
        work.scale,
        work.shift,
        *((None, None) if sums is None else sums),
        lines,
        run,
        filters,
        segments,
        geometry.top,
        geometry.dilation_h,
        shift_even,
        shift_odd,
        STEPS=Steps(work.depth, *geometry.stride, geometry.dilation_w),
        **work.options,
    )
    return None if sums is None else merge_parts(sums, config.block_m, run)


def _by_pointers(work: _Work) -> tuple[Tensor, Tensor] | None:
    config, geometry, x = work.config, work.geometry, work.x
    images, filters, lines, run = work.y.shape
    pixels, groups = images * lines * run, geometry.groups
    if pixels + config.block_m >= 2**31:
        raise ValueError(
            f"conv2d: an output of {images} x {lines} x {run} pixels is too large for the pointer form; "
            "use smaller tiles"
        )
    tiles = triton.cdiv(pixels, config.block_m)
    sums = work.sums(tiles)
    _conv2d_pointer_kernel[(tiles * triton.cdiv(filters // groups, config.block_n), groups)](
        as_map(x),
        work.matrix,
        *map(as_map, (work.residual, work.mask, work.y, work.z)),
        work.scale,
        work.shift,
        *((None, None) if sums is None else sums),
        x.shape[0],
        *x.shape[2:],
        *work.y.shape[2:],
        work.depth,
        filters // groups,
        geometry.top,
        geometry.left,
        *geometry.stride,
        *geometry.dilation,
        **work.options,
    )
    return None if sums is None else merge_parts(sums, config.block_m, pixels)


def conv2d_forward_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    act: str,
    mask: Tensor | None = None,
    mask_act: str = "none",
) -> tuple[Tensor, Tensor]:
    """y and z in plain PyTorch."""
    z = F.conv2d(geometry.padded(x), weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)
    if scale is not None:
        z = z * scale.reshape(-1, 1, 1)
    if shift is not None:
        z = z + shift.reshape(-1, 1, 1)
    if residual is not None:
        z = z + residual
    y = activate_reference(z, act)
    return (y if mask is None else y * slope_reference(mask, mask_act)), z
