"""Batch normalisation in training by kernels for parts of a map (tiles), so that a map need not fit in memory:

    normalize_act            y = act(z),   z = xhat * weight + bias + residual,   xhat = (x - mean) * rstd
    normalize_act_gradients  dx = weight * rstd * dz,   dz = (dy + plus) * act'(z),
                             dbias = sum dz,   dweight = sum dz * xhat

dx assumes constant statistics. The gradients of the statistics follow from dbias and dweight of all tiles, and
`moments_backward` (moments.py) adds them. `plus` is the gradient of a sum over the pixels of y (such as the mean in
squeeze-and-excite): one number for each channel, without a map.

If the statistics are those of the given pixels only, a second pass computes the complete dx from the sums of the first:

    dx = rstd * (weight * dz - a / n - xhat * b / n)                    n values of a channel, or group of channels
    a = sum weight * dbias,   b = sum weight * dweight                  of the channels of a group

(Ioffe and Szegedy, 2015, section 3; Wu and He, 2018, for groups.) The first pass writes dz only if a residual needs it,
and the second reads dz, or dy again.

Each kernel is one pass over memory. Only x (the raw output of the convolution) is saved: z is computed again in
registers. If a residual was added, `gate` replaces z: z itself, or y for ReLU and ReLU6. The statistics come from
`moments`, or from the epilogue of the convolution that makes x (`conv2d_moments`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_reference, check_activation, slope
from .choice import run_fastest
from .dtypes import promoted, sum_dtype
from .pointwise import act_grad
from .stream import SHARE, Share, Stream, channel, load, step_pixels, store, whole
from .tiles import MOST_BLOCK_CHANNELS, merge_blocks
from .triton_private import jit_kernel
from .tuning import roomy_registers
from .windows import map_like, nhwc, without_margin


@triton.jit
def affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, C, BC: tl.constexpr, ACC: tl.constexpr):
    """mean, rstd, scale = rstd * weight and bias of the channels c, each [1, BC]."""
    mean, rstd = channel(mean_ptr, c, C, ACC), channel(rstd_ptr, c, C, ACC)
    scale = rstd if weight_ptr is None else rstd * channel(weight_ptr, c, C, ACC)
    bias = tl.zeros((1, BC), ACC) if bias_ptr is None else channel(bias_ptr, c, C, ACC)
    return mean, rstd, scale, bias


@jit_kernel(SHARE)
def _normalize_act_kernel(
    x,  # map [N, C, H, W]
    residual,  # map [N, C, H, W] or None
    y,  # map [N, C, H, W]
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    pixels,
    H,
    W,
    C,
    period,
    steps,
    ACT: tl.constexpr,
    TILE: tl.constexpr,
):
    """y = act((x - mean) * rstd * weight + bias + residual) of a program's share of the pixels."""
    C = whole(C, TILE.VEC)
    share = Share(pixels, H, W, C, period, steps)
    c = tl.program_id(1) * TILE.BC + tl.arange(0, TILE.BC)
    mean, _, scale, bias = affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c % share.period, C, TILE.BC, TILE.ACC)
    for step in range(share.steps):
        p = step_pixels(share, step, TILE)
        keep = (p < share.pixels)[:, None] & (c < C)[None, :]
        # Not x * scale + shift: that would cancel if the mean is far from zero.
        z = (load(x, p, c, keep, share, TILE) - mean) * scale + bias
        if residual.ptr is not None:
            z += load(residual, p, c, keep, share, TILE)
        store(y, p, c, keep, activate(z, ACT), share, TILE)


@jit_kernel(SHARE)
def _normalize_act_gradients_kernel(
    x,  # map [N, C, H, W]
    dy,  # map [N, C, H, W]
    gate,  # map [N, C, H, W] or None
    dx,  # map [N, C, H, W] or None
    dz,  # map [N, C, H, W] or None
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    plus_ptr,  # [C] or None: added to dy at each pixel
    sums_ptr,  # [programs, 2, C], C folded; of dz and of dz * xhat
    pixels,
    H,
    W,
    C,
    period,
    steps,
    ACT: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx = weight * rstd * dz of a program's share of the pixels, dz = dy * act'(z), and its sums."""
    C = whole(C, TILE.VEC)
    share = Share(pixels, H, W, C, period, steps)
    c = tl.program_id(1) * TILE.BC + tl.arange(0, TILE.BC)
    mean, rstd, scale, bias = affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c % share.period, C, TILE.BC, TILE.ACC)
    BM: tl.constexpr = TILE.BM
    BC: tl.constexpr = TILE.BC
    dbias = tl.zeros((BM, BC), TILE.ACC)
    dweight = tl.zeros((BM, BC), TILE.ACC)
    plus = None if plus_ptr is None else channel(plus_ptr, c % share.period, C, TILE.ACC)
    for step in range(share.steps):
        p = step_pixels(share, step, TILE)
        keep = (p < share.pixels)[:, None] & (c < C)[None, :]
        centred = load(x, p, c, keep, share, TILE) - mean
        # z as in the forward, so that its sign is the same.
        z = centred * scale + bias if gate.ptr is None else load(gate, p, c, keep, share, TILE)
        d = load(dy, p, c, keep, share, TILE)
        if plus_ptr is not None:
            d += tl.where(keep, plus, 0.0)
        d *= slope(z, ACT)
        if dz.ptr is not None:
            store(dz, p, c, keep, d, share, TILE)
        dbias += d
        dweight += d * centred
        if dx.ptr is not None:
            store(dx, p, c, keep, scale * d, share, TILE)
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(row + c, tl.sum(dbias, 0), mask=c < C)
    tl.store(row + C + c, tl.sum(dweight * rstd, 0), mask=c < C)


def _stream(op: str, act: str, *maps: Tensor | None) -> Stream:
    check_activation(op, act)
    return Stream(op, MOST_BLOCK_CHANNELS, *maps, fold=True)


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
        x, residual, y: (N, C, H, W) windows, each of any floating dtype; y may be x or the residual.
        mean, rstd, weight, bias: (C,), of any floating dtype.
    """
    if x.numel():
        s = _stream("normalize_act", act, x, residual, y)
        s.launch(_normalize_act_kernel, mean, rstd, weight, bias, ACT=act)


def _normalize_stock(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x - mean) * rstd * weight + bias by `torch.batch_norm`; `F.batch_norm` refuses an epsilon of zero."""
    variance = rstd.square().reciprocal()
    return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, 0.0, torch.backends.cudnn.enabled)


@torch.library.custom_op("gigamorph::normalize_act", mutates_args=())
def normalize_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    dtype: torch.dtype | None = None,
    margin: Sequence[int] | None = None,
) -> Tensor:
    """act((x - mean) * rstd * weight + bias + residual) in channels-last memory; see `launch_normalize_act`.

    Args:
        dtype: the dtype of the result, which is rounded once; None for that of x.
        margin: rows above and columns to the left of the result to leave unwritten, as in `conv2d_forward`.
    """
    x, residual = nhwc(x), None if residual is None else nhwc(residual)
    dtype = dtype or x.dtype

    def ours() -> Tensor:
        whole = map_like(x, dtype, margin)
        launch_normalize_act(x, mean, rstd, weight, bias, residual, act, without_margin(whole, margin))
        return whole

    def stock() -> Tensor:
        y = nhwc(_normalize_stock(x.to(promoted(x.dtype, dtype, residual)), mean, rstd, weight, bias))
        y = activate_reference(y if residual is None else y.add_(residual), act).to(dtype)
        if margin is None:
            return y
        whole = map_like(x, dtype, margin)
        without_margin(whole, margin).copy_(y)
        return whole

    settings = (weight is None, bias is None, residual is None, act, margin is None, *_others(x, dtype, residual))
    return run_fastest("normalize_act", x, settings, ours, stock)


@normalize_act.register_fake
def _(x, mean, rstd, weight, bias, residual, act, dtype=None, margin=None):
    return map_like(x, dtype, margin)


def _others(x: Tensor, *parts: torch.dtype | Tensor | None) -> tuple[str, ...]:
    """The dtypes other than x's, as part of a key."""
    kinds = {part if isinstance(part, torch.dtype) else part.dtype for part in parts if part is not None}
    return tuple(sorted(str(kind) for kind in kinds - {x.dtype}))


# -- backward -----------------------------------------------------------------------------------------------------


def launch_normalize_act_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    dx: Tensor | None,
    dz: Tensor | None,
    plus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write dx = weight * rstd * dz and dz (the residual's gradient) if given; return the sums of dz and dz * xhat.

    Args:
        dy, x: (N, C, H, W) windows, the gradient of y and the raw map, each of any floating dtype.
        gate: a window of x's size that determines the slope of act: z, or y for ReLU and ReLU6. None computes z from x,
            which requires that no residual was added.
        dx, dz: windows of x's size; dx or dz may be dy.
        plus: (C,), added to each pixel of dy: the gradient of a sum over the pixels of y.
    """
    if not x.numel():
        return x.new_zeros(x.shape[1], dtype=sum_dtype(x.dtype)), x.new_zeros(x.shape[1], dtype=sum_dtype(x.dtype))
    s = _stream("normalize_act_gradients", act, x, dy, gate, dx, dz)
    sums = s.sums(x, 2)
    # Addresses of unequally spaced pixels take more registers than this limit.
    options = roomy_registers(x.device, 128) if s.tile.FLAT else {}
    s.launch(_normalize_act_gradients_kernel, mean, rstd, weight, bias, plus, sums, ACT=act, **options)
    return add_parts(sums, s.folds)


@jit_kernel(["count", *SHARE])
def _live_norm_kernel(
    x,  # map [N, C, H, W]
    dy,  # map [N, C, H, W]
    gate,  # map [N, C, H, W] or None
    dx,  # map [N, C, H, W]
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    a_ptr,  # [C], a of each channel's group; dbias if each channel is a group
    b_ptr,  # [C], b; dweight
    plus_ptr,  # [C] or None: added to dy at each pixel
    count,
    pixels,
    H,
    W,
    C,
    period,
    steps,
    GROUPS: tl.constexpr,  # whether channels share statistics
    ACT: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx of a program's share of the pixels, given the sums over all pixels."""
    C = whole(C, TILE.VEC)
    share = Share(pixels, H, W, C, period, steps)
    c = tl.program_id(1) * TILE.BC + tl.arange(0, TILE.BC)
    at = c % share.period
    mean, rstd, scale, bias = affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, at, C, TILE.BC, TILE.ACC)
    factor = rstd if GROUPS else scale  # a = weight * dbias and b = weight * dweight for single channels
    shift = factor * channel(a_ptr, at, C, TILE.ACC) / count.to(TILE.ACC)
    tilt = rstd * factor * channel(b_ptr, at, C, TILE.ACC) / count.to(TILE.ACC)
    plus = None if plus_ptr is None else channel(plus_ptr, at, C, TILE.ACC)
    for step in range(share.steps):
        p = step_pixels(share, step, TILE)
        keep = (p < share.pixels)[:, None] & (c < C)[None, :]
        centred = load(x, p, c, keep, share, TILE) - mean
        z = centred * scale + bias if gate.ptr is None else load(gate, p, c, keep, share, TILE)
        d = load(dy, p, c, keep, share, TILE)
        if plus_ptr is not None:
            d += plus
        d *= slope(z, ACT)
        store(dx, p, c, keep, scale * d - shift - centred * tilt, share, TILE)


def launch_live_norm(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    sums: tuple[Tensor, Tensor],
    together: int,
    dx: Tensor,
    plus: Tensor | None = None,
) -> None:
    """Write the complete dx, given `sums`, dbias and dweight; `together` channels share statistics.

    The other arguments are those of `launch_normalize_act_gradients`.
    """
    if x.numel():
        s = Stream("normalize_act_gradients", MOST_BLOCK_CHANNELS, x, dy, gate, dx, fold=True)
        a, b = group_sums(sums, weight, together) if together > 1 else sums
        vectors, count = (mean, rstd, weight, bias, a, b, plus), s.pixels * together
        s.launch(_live_norm_kernel, *vectors, count, GROUPS=together > 1, ACT=act)


def group_sums(sums: tuple[Tensor, Tensor], weight: Tensor | None, together: int) -> Tensor:
    """a and b of each channel's group, (2, C)."""
    both = torch.stack(sums) if weight is None else torch.stack(sums) * weight
    if together == 1:
        return both
    return both.unflatten(1, (-1, together)).sum(2, keepdim=True).expand(-1, -1, together).flatten(1)


@jit_kernel(["parts"])
def _add_kernel(
    x_ptr,  # [parts, 2, C]
    first_ptr,  # [C]
    second_ptr,  # [C]
    parts,
    sp,
    ss,  # from part to part, from sum to sum
    C,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One of the two sums of BC channels over all parts, BM at a time."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x_ptr += tl.program_id(1).to(tl.int64) * ss
    total = tl.zeros((BM, BC), x_ptr.dtype.element_ty)
    for begin in range(0, parts, BM):
        part = begin + tl.arange(0, BM)
        at = part.to(tl.int64)[:, None] * sp + c[None, :]
        total += tl.load(x_ptr + at, mask=(part < parts)[:, None] & (c < C)[None, :], other=0.0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + c, tl.sum(total, 0), mask=c < C)
    else:
        tl.store(second_ptr + c, tl.sum(total, 0), mask=c < C)


def _add(x: Tensor, first: Tensor, second: Tensor) -> None:
    parts, _, channels = x.shape
    rows, block = merge_blocks(parts, channels)
    grid = triton.cdiv(channels, block), 2
    _add_kernel[grid](x, first, second, parts, x.stride(0), x.stride(1), channels, BM=rows, BC=block)


def add_parts(parts: Tensor, folds: int) -> tuple[Tensor, Tensor]:
    """The two sums of each channel over the programs of a streaming kernel and its folds, in a fixed order.

    Args:
        parts: (programs, 2, folds * C), C channels next to each other.
    """
    width, like = parts.shape[2], {"dtype": parts.dtype, "device": parts.device}
    if folds > 1:
        # Over programs first: each of the many folded channels is summed separately, so many programs have work.
        sums = torch.empty(2, folds, width // folds, **like)
        _add(parts, *sums)
        parts = sums.transpose(0, 1)
    first, second = (torch.empty(width // folds, **like) for _ in range(2))
    _add(parts, first, second)
    return first, second


def _gradients(dy: Tensor, x: Tensor, keep_dz: bool) -> tuple[Tensor, Tensor]:
    return map_like(x), map_like(dy) if keep_dz else dy.new_empty(0)


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
    together: int = 0,
    plus: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz (empty unless `keep_dz`), dbias and dweight.

    Args:
        dy, x, gate: as for `launch_normalize_act_gradients`; dx has x's dtype, dz that of dy.
        together: 0 for constant statistics, in one pass. Otherwise the statistics are those of x, dx includes the
            gradient through them, in two passes, and `together` neighbouring channels share them; more than one
            requires a single image.
        plus: (C,), added to each pixel of dy, or None.
    """
    dy, x, gate = nhwc(dy), nhwc(x), None if gate is None else nhwc(gate)

    def ours() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx, dz = _gradients(dy, x, keep_dz)
        given, saved = (x, mean, rstd, weight, bias), dz if keep_dz else None
        sums = launch_normalize_act_gradients(dy, *given, gate, act, None if together else dx, saved, plus)
        if together and saved is not None:  # dz includes the slope and `plus`
            launch_live_norm(saved, *given, None, "none", sums, together, dx)
        elif together:
            launch_live_norm(dy, *given, gate, act, sums, together, dx, plus)
        return dx, dz, *sums

    def stock() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide, var = sum_dtype(x.dtype), rstd.square().reciprocal()
        inner = promoted(dy, x, gate, plus) if together < 2 else wide  # 16-bit statistics would be too coarse
        z, taken, grad = gate, x.to(inner), dy.to(inner)
        if plus is not None:
            grad = grad + plus.to(inner).reshape(-1, 1, 1)
        if z is None and act != "none":
            z = _normalize_stock(taken, mean, rstd, weight, bias)
        dz = grad if z is None else act_grad(grad, z.to(inner), act)
        scale = torch.ones_like(mean) if weight is None else weight
        if together > 1:
            groups = (t[None, ::together].to(inner).contiguous() for t in (mean, rstd))
            size = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], x.shape[1] // together
            form = {"memory_format": torch.channels_last}
            dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
                dz.contiguous(**form), taken.contiguous(**form), *groups, scale.to(inner), *size, [True, True, True]
            )
        else:
            statistics = mean, var, mean, rstd  # a GPU reads the second two
            dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                dz, taken, scale, *statistics, together == 1, 0.0, [True, True, True]
            )
        saved = (dz.clone() if dz is dy else dz.to(dy.dtype)) if keep_dz else dy.new_empty(0)
        return nhwc(dx.to(x.dtype)), saved, dbias.to(wide), dweight.to(wide)

    given = (weight is None, bias is None, gate is None, plus is None)
    settings = (*given, act, keep_dz, min(together, 2), *_others(x, dy, gate))
    return run_fastest("normalize_act_gradients", x, settings, ours, stock) if x.numel() else ours()


@normalize_act_gradients.register_fake
def _(dy, x, mean, rstd, weight, bias, gate, act, keep_dz, together=0, plus=None):
    dbias, dweight = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return *_gradients(dy, x, keep_dz), dbias, dweight
