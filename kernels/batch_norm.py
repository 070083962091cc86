"""Batch normalisation in training, in pieces that work on parts of a map (tiles), so that a map need not fit in memory:

    normalize_act            y = act(z),   z = xhat * weight + bias + residual,   xhat = (x - mean) * rstd
    gradient_sums            dbias = sum dz,   dweight = sum dz * xhat,   dz = dy * act'(z)      these add over windows
    normalize_act_backward   dx = weight * rstd * (dz - dbias / n - xhat * dweight / n)

Where statistics are values of their own, whose gradients others put together, as in the engine's sweeps, the backward
is two other passes, which add up to the same:

    normalize_act_gradients  dx = weight * rstd * dz, and in the same pass dbias and dweight
    moments_backward         dx += dmean / n + 2 (x - mean) dvar / n                             (moments.py)

Each is one pass over memory. x (the raw output of the convolution) is all that is kept: z is computed again in
registers. Where a residual was added, `gate` stands for z: z itself, or y for ReLU and ReLU6. The statistics are those
of `moments`, or come out of the epilogue of the convolution that makes x (`conv2d_moments`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .activations import ACTIVATIONS, MASKS, activate, activate_reference, slope, slope_reference
from .choice import run_fastest
from .dtypes import accumulator, sum_dtype
from .layer_norm import Stream, is_flat, pixel_offsets
from .moments import channel, share_out, strides_of
from .pointwise import act_grad
from .windows import empty_map, nhwc


@triton.jit
def _normalize_act_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,
    r_sn: tl.int64,
    r_sh: tl.int64,
    r_sw: tl.int64,
    y_sn: tl.int64,
    y_sh: tl.int64,
    y_sw: tl.int64,
    pixels,
    H,
    W,
    C,
    steps,
    BM: tl.constexpr,
    BC: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, rstd = channel(mean_ptr, c, C, ACC), channel(rstd_ptr, c, C, ACC)
    scale = rstd * channel(weight_ptr, c, C, ACC) if HAS_WEIGHT else rstd
    bias = channel(bias_ptr, c, C, ACC) if HAS_BIAS else tl.zeros((1, BC), ACC)
    first = tl.program_id(0) * steps * BM
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)
        keep = (p < pixels)[:, None] & (c < C)[None, :]
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c[None, :]
        # Not x * scale + shift: with a mean far from zero that would cancel.
        z = (tl.load(x_ptr + at, mask=keep, other=0.0).to(ACC) - mean) * scale + bias
        if HAS_RESIDUAL:
            at = pixel_offsets(p, H, W, r_sn, r_sh, r_sw, FLAT)[:, None] + c[None, :]
            z += tl.load(residual_ptr + at, mask=keep, other=0.0).to(ACC)
        at = pixel_offsets(p, H, W, y_sn, y_sh, y_sw, FLAT)[:, None] + c[None, :]
        tl.store(y_ptr + at, activate(z, ACT).to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _slopes(
    dy,
    centred,
    scale,
    bias,
    gate_ptr,
    p,
    c,
    keep,
    H,
    W,
    g_sn,
    g_sh,
    g_sw,
    FLAT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dz = dy * act'(z), z from the gate or computed again just as in the forward, so that both see the same sign."""
    if HAS_GATE:
        at = pixel_offsets(p, H, W, g_sn, g_sh, g_sw, FLAT)[:, None] + c[None, :]
        z = tl.load(gate_ptr + at, mask=keep, other=0.0).to(ACC)
    else:
        z = centred * scale + bias
    return dy * slope(z, ACT)


@triton.jit
def _gradient_sums_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    sums_ptr,  # sums: [programs, 2, C]
    dy_sn: tl.int64,
    dy_sh: tl.int64,
    dy_sw: tl.int64,
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,
    g_sn: tl.int64,
    g_sh: tl.int64,
    g_sw: tl.int64,
    pixels,
    H,
    W,
    C,
    steps,
    BM: tl.constexpr,
    BC: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, rstd = channel(mean_ptr, c, C, ACC), channel(rstd_ptr, c, C, ACC)
    scale = rstd * channel(weight_ptr, c, C, ACC) if HAS_WEIGHT else rstd
    bias = channel(bias_ptr, c, C, ACC) if HAS_BIAS else tl.zeros((1, BC), ACC)
    dbias = tl.zeros((BM, BC), ACC)
    dweight = tl.zeros((BM, BC), ACC)
    first = tl.program_id(0) * steps * BM
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)
        keep = (p < pixels)[:, None] & (c < C)[None, :]
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c[None, :]
        centred = tl.load(x_ptr + at, mask=keep, other=0.0).to(ACC) - mean
        at = pixel_offsets(p, H, W, dy_sn, dy_sh, dy_sw, FLAT)[:, None] + c[None, :]
        dy = tl.load(dy_ptr + at, mask=keep, other=0.0).to(ACC)
        dz = _slopes(dy, centred, scale, bias, gate_ptr, p, c, keep, H, W, g_sn, g_sh, g_sw, FLAT, HAS_GATE, ACT, ACC)
        dbias += dz
        dweight += dz * (centred * rstd)
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(row + c, tl.sum(dbias, 0), mask=c < C)
    tl.store(row + C + c, tl.sum(dweight, 0), mask=c < C)


@triton.jit
def _normalize_act_backward_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    mean_dz_ptr,
    mean_dz_xhat_ptr,
    dx_ptr,
    dz_ptr,
    sums_ptr,  # [programs, 2, C]
    dy_sn: tl.int64,
    dy_sh: tl.int64,
    dy_sw: tl.int64,
    x_sn: tl.int64,
    x_sh: tl.int64,
    x_sw: tl.int64,
    g_sn: tl.int64,
    g_sh: tl.int64,
    g_sw: tl.int64,
    dx_sn: tl.int64,
    dx_sh: tl.int64,
    dx_sw: tl.int64,
    dz_sn: tl.int64,
    dz_sh: tl.int64,
    dz_sw: tl.int64,
    pixels,
    H,
    W,
    C,
    steps,
    BM: tl.constexpr,
    BC: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_DZ: tl.constexpr,
    SUMS: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, rstd = channel(mean_ptr, c, C, ACC), channel(rstd_ptr, c, C, ACC)
    scale = rstd * channel(weight_ptr, c, C, ACC) if HAS_WEIGHT else rstd
    bias = channel(bias_ptr, c, C, ACC) if HAS_BIAS else tl.zeros((1, BC), ACC)
    if SUMS:
        dbias = tl.zeros((BM, BC), ACC)
        dweight = tl.zeros((BM, BC), ACC)
    else:
        mean_dz, mean_dz_xhat = channel(mean_dz_ptr, c, C, ACC), channel(mean_dz_xhat_ptr, c, C, ACC)
    first = tl.program_id(0) * steps * BM
    for step in range(steps):
        p = first + step * BM + tl.arange(0, BM)
        keep = (p < pixels)[:, None] & (c < C)[None, :]
        at = pixel_offsets(p, H, W, x_sn, x_sh, x_sw, FLAT)[:, None] + c[None, :]
        centred = tl.load(x_ptr + at, mask=keep, other=0.0).to(ACC) - mean
        at = pixel_offsets(p, H, W, dy_sn, dy_sh, dy_sw, FLAT)[:, None] + c[None, :]
        dy = tl.load(dy_ptr + at, mask=keep, other=0.0).to(ACC)
        dz = _slopes(dy, centred, scale, bias, gate_ptr, p, c, keep, H, W, g_sn, g_sh, g_sw, FLAT, HAS_GATE, ACT, ACC)
        if HAS_DZ:
            at = pixel_offsets(p, H, W, dz_sn, dz_sh, dz_sw, FLAT)[:, None] + c[None, :]
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=keep)
        if SUMS:
            dbias += dz
            dweight += dz * (centred * rstd)
            dx = scale * dz
        else:
            dx = scale * (dz - mean_dz - centred * rstd * mean_dz_xhat)
        at = pixel_offsets(p, H, W, dx_sn, dx_sh, dx_sw, FLAT)[:, None] + c[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)
    if SUMS:
        row = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C
        tl.store(row + c, tl.sum(dbias, 0), mask=c < C)
        tl.store(row + C + c, tl.sum(dweight, 0), mask=c < C)


def _config(x: Tensor, op: str, act: str = "none") -> tuple[int, Stream, tuple[int, int]]:
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {act!r}; use one of {', '.join(ACTIVATIONS)}")
    return share_out(x, op)


# -- forward ------------------------------------------------------------------------------------------------------


def launch_normalize_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    y: Tensor,
) -> None:
    """Write y = act((x - mean) * rstd * weight + bias + residual).

    Args:
        x, residual, y: (N, C, H, W) windows; y may be x or the residual.
        mean, rstd, weight, bias: (C,), of any floating dtype.
    """
    if not x.numel():
        return
    pixels, config, grid = _config(x, "normalize_act", act)
    _normalize_act_kernel[grid](
        x,
        mean,
        rstd,
        weight,
        bias,
        residual,
        y,
        *strides_of(x, x, residual, y),
        pixels,
        x.shape[2],
        x.shape[3],
        x.shape[1],
        config.steps,
        BM=config.block_m,
        BC=config.block_c,
        FLAT=is_flat(x, residual, y),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACT=act,
        ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
    )


@torch.library.custom_op("gigamorph::normalize_act", mutates_args=())
def normalize_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    """act((x - mean) * rstd * weight + bias + residual) in channels-last memory; see `launch_normalize_act`."""
    x, residual = nhwc(x), None if residual is None else nhwc(residual)

    def ours() -> Tensor:
        y = empty_map(*x.shape, x)
        launch_normalize_act(x, mean, rstd, weight, bias, residual, act, y)
        return y

    def stock() -> Tensor:
        y = nhwc(F.batch_norm(x, mean, rstd.square().reciprocal(), weight, bias, False, 0.0, 0.0))
        return activate_reference(y if residual is None else y.add_(residual), act)

    return run_fastest("normalize_act", x, (weight is None, bias is None, residual is None, act), ours, stock)


@normalize_act.register_fake
def _(x, mean, rstd, weight, bias, residual, act):
    return empty_map(*x.shape, x)


def normalize_act_reference(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    """y and z in plain PyTorch."""
    z = (x - mean.reshape(-1, 1, 1)) * rstd.reshape(-1, 1, 1)
    if weight is not None:
        z = z * weight.reshape(-1, 1, 1)
    if bias is not None:
        z = z + bias.reshape(-1, 1, 1)
    if residual is not None:
        z = z + residual
    return activate_reference(z, act), z


def _setup_normalize(ctx, inputs, output) -> None:
    x, mean, rstd, weight, bias, residual, ctx.act = inputs
    if residual is not None and ctx.act not in (*MASKS, "none"):
        raise ValueError(
            f"normalize_act: the output does not show the slope of {ctx.act!r} behind a sum; add before it"
        )
    gate = output if residual is not None and ctx.act != "none" else None
    ctx.save_for_backward(x, mean, rstd, weight, bias, gate)
    ctx.dtypes = [None if t is None else t.dtype for t in (mean, rstd, weight, bias, residual)]


def _differentiate_normalize(ctx, dy):
    x, mean, rstd, weight, bias, gate = ctx.saved_tensors
    keep = ctx.needs_input_grad[5] and gate is not None
    dx, dz, dbias, dweight = normalize_act_gradients(dy, x, mean, rstd, weight, bias, gate, ctx.act, keep)
    scale = 1.0 if weight is None else weight.to(dbias.dtype)
    wide = rstd.to(dbias.dtype)
    grads = -dbias * scale * wide, dweight * scale / wide, dweight, dbias, dz if keep else dy
    made = (None if dtype is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
    return dx, *made, None


normalize_act.register_autograd(_differentiate_normalize, setup_context=_setup_normalize)


# -- backward -----------------------------------------------------------------------------------------------------


def launch_gradient_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    """Sums of dz and of dz * xhat over (N, C, H, W) windows; see `gradient_sums`."""
    channels = x.shape[1]
    if not x.numel():
        return x.new_zeros(channels, dtype=sum_dtype(x.dtype)), x.new_zeros(channels, dtype=sum_dtype(x.dtype))
    pixels, config, grid = _config(x, "gradient_sums", act)
    sums = torch.empty(grid[0], 2, channels, dtype=sum_dtype(x.dtype), device=x.device)
    _gradient_sums_kernel[grid](
        dy,
        x,
        mean,
        rstd,
        weight,
        bias,
        gate,
        sums,
        *strides_of(x, dy, x, gate),
        pixels,
        x.shape[2],
        x.shape[3],
        channels,
        config.steps,
        BM=config.block_m,
        BC=config.block_c,
        FLAT=is_flat(dy, x, gate),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        ACT=act,
        ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
    )
    return sums[:, 0].sum(0), sums[:, 1].sum(0)


@torch.library.custom_op("gigamorph::gradient_sums", mutates_args=())
def gradient_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    """Sums over a window of dz and of dz * xhat: dbias and dweight, (C,) in float32 (float64 for float64).

    Args:
        dy, x: (N, C, H, W), the gradient of y and the raw map.
        gate: what gives act's slope, of x's size: z, or y for ReLU and ReLU6. None: z is computed from x, which is
            right where no residual was added.
    """
    return launch_gradient_sums(nhwc(dy), nhwc(x), mean, rstd, weight, bias, None if gate is None else nhwc(gate), act)


@gradient_sums.register_fake
def _(dy, x, mean, rstd, weight, bias, gate, act):
    dbias, dweight = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return dbias, dweight


def launch_normalize_act_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
    dx: Tensor,
    dz: Tensor | None,
) -> None:
    """Write dx = weight * rstd * (dz - mean_dz - xhat * mean_dz_xhat), and dz if given (the residual's gradient).

    Args:
        dy, x, gate: as in `gradient_sums`.
        mean_dz, mean_dz_xhat: (C,), the sums of `gradient_sums` over the whole map, divided by its pixels.
        dx, dz: windows of x's size; dx or dz may be dy.
    """
    if not x.numel():
        return
    pixels, config, grid = _config(x, "normalize_act_backward", act)
    _normalize_act_backward_kernel[grid](
        dy,
        x,
        mean,
        rstd,
        weight,
        bias,
        gate,
        mean_dz,
        mean_dz_xhat,
        dx,
        dz,
        None,
        *strides_of(x, dy, x, gate, dx, dz),
        pixels,
        x.shape[2],
        x.shape[3],
        x.shape[1],
        config.steps,
        BM=config.block_m,
        BC=config.block_c,
        FLAT=is_flat(dy, x, gate, dx, dz),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_DZ=dz is not None,
        SUMS=False,
        ACT=act,
        ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
    )


def launch_normalize_act_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    dx: Tensor,
    dz: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Write dx = weight * rstd * dz, and dz if given; return the sums of dz and of dz * xhat. Args as above."""
    channels = x.shape[1]
    if not x.numel():
        return x.new_zeros(channels, dtype=sum_dtype(x.dtype)), x.new_zeros(channels, dtype=sum_dtype(x.dtype))
    pixels, config, grid = _config(x, "normalize_act_gradients", act)
    sums = torch.empty(grid[0], 2, channels, dtype=sum_dtype(x.dtype), device=x.device)
    _normalize_act_backward_kernel[grid](
        dy,
        x,
        mean,
        rstd,
        weight,
        bias,
        gate,
        None,
        None,
        dx,
        dz,
        sums,
        *strides_of(x, dy, x, gate, dx, dz),
        pixels,
        x.shape[2],
        x.shape[3],
        channels,
        config.steps,
        BM=config.block_m,
        BC=config.block_c,
        FLAT=is_flat(dy, x, gate, dx, dz),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_DZ=dz is not None,
        SUMS=True,
        ACT=act,
        ACC=accumulator(x.dtype),
        num_warps=config.num_warps,
    )
    return sums[:, 0].sum(0), sums[:, 1].sum(0)


@torch.library.custom_op("gigamorph::normalize_act_backward", mutates_args=())
def normalize_act_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
    keep_dz: bool,
) -> tuple[Tensor, Tensor]:
    """dx, and dz (empty unless `keep_dz`); see `launch_normalize_act_backward`."""
    dy, x, gate = nhwc(dy), nhwc(x), None if gate is None else nhwc(gate)
    dx, dz = _gradients(x, keep_dz)
    launch_normalize_act_backward(
        dy, x, mean, rstd, weight, bias, gate, act, mean_dz, mean_dz_xhat, dx, dz if keep_dz else None
    )
    return dx, dz


def _gradients(x: Tensor, keep_dz: bool) -> tuple[Tensor, Tensor]:
    return empty_map(*x.shape, x), empty_map(*x.shape, x) if keep_dz else x.new_empty(0)


@normalize_act_backward.register_fake
def _(dy, x, mean, rstd, weight, bias, gate, act, mean_dz, mean_dz_xhat, keep_dz):
    return _gradients(x, keep_dz)


@torch.library.custom_op("gigamorph::normalize_act_gradients", mutates_args=())
def normalize_act_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    keep_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx with the statistics taken as constants, dz (empty unless `keep_dz`), dbias and dweight, in one pass.

    Args:
        dy, x, gate: as for `gradient_sums`.
    """
    dy, x, gate = nhwc(dy), nhwc(x), None if gate is None else nhwc(gate)

    def ours() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx, dz = _gradients(x, keep_dz)
        sums = launch_normalize_act_gradients(dy, x, mean, rstd, weight, bias, gate, act, dx, dz if keep_dz else None)
        return dx, dz, *sums

    def stock() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide, var = sum_dtype(x.dtype), rstd.square().reciprocal()
        z = gate
        if z is None and act != "none":
            z = F.batch_norm(x, mean, var, weight, bias, False, 0.0, 0.0)
        dz = dy if z is None else act_grad(dy, z, act)
        scale = torch.ones_like(mean) if weight is None else weight
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dz, x, scale, mean, var, None, None, False, 0.0, [True, True, True]
        )
        kept = (dz.clone() if dz is dy else dz) if keep_dz else x.new_empty(0)
        return nhwc(dx), kept, dbias.to(wide), dweight.to(wide)

    settings = (weight is None, bias is None, gate is None, act, keep_dz)
    return run_fastest("normalize_act_gradients", x, settings, ours, stock) if x.numel() else ours()


@normalize_act_gradients.register_fake
def _(dy, x, mean, rstd, weight, bias, gate, act, keep_dz):
    dbias, dweight = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return *_gradients(x, keep_dz), dbias, dweight


def normalize_act_backward_reference(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz and the window's sums of dz and of dz * xhat, in plain PyTorch."""
    z = normalize_act_reference(x, mean, rstd, weight, bias, None, "none")[0] if gate is None else gate
    dz = dy * slope_reference(z, act)
    xhat = normalize_act_reference(x, mean, rstd, None, None, None, "none")[0]
    dx = (dz - mean_dz.reshape(-1, 1, 1) - xhat * mean_dz_xhat.reshape(-1, 1, 1)) * rstd.reshape(-1, 1, 1)
    if weight is not None:
        dx = dx * weight.reshape(-1, 1, 1)
    return dx, dz, dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))
