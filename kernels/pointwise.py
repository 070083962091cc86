"""Additions, scales and activations in one pass over memory, where no neighbour's epilogue can take them:

    z = x * scale + shift + residual,   y = act(z)
    dz = dy * act'(z),   dx = dz * scale,   dresidual = dz,   dscale = sum of dz * x,   dshift = sum of dz

`add_act` leaves scale and shift out; `affine_act` is a frozen BatchNorm with its activation. The backward reads the
slope off y where y tells it (ReLU, ReLU6) and recomputes z otherwise, so z is never stored. The sums over pixels are
split among programs whose partial sums, in float32, are added in order: no atomics, the same bits every time.

Nothing here computes much, so the kernels only have to keep memory busy: every thread moves 16 bytes at once, along
the channels. Axes that follow one another in memory in every map are joined, so that dense maps are one long run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS, MASKS, activate, activate_reference, slope, slope_reference
from .choice import run_fastest
from .dtypes import accumulator
from .tuning import interpreting, power_of_two
from .windows import empty_map, nhwc, spatial_strides

Strides = tuple[int, int, int]


@triton.jit
def tile_pixels(tile, H, W, BH: tl.constexpr, BW: tl.constexpr):
    """Image, rows [BH*BW], columns [BH*BW] of a tile of images of H x W pixels, and which of them exist."""
    rows, columns = tl.cdiv(H, BH), tl.cdiv(W, BW)
    m = tl.arange(0, BH * BW)
    # Divided in 32 bits, which is cheap, but multiplied in 64.
    n = (tile // columns // rows).to(tl.int64)
    i = (tile // columns % rows).to(tl.int64) * BH + m // BW
    j = (tile % columns).to(tl.int64) * BW + m % BW
    return n, i, j, (i < H) & (j < W)


@triton.jit
def tile_offsets(strides, n, i, j, c, VEC: tl.constexpr):
    """Offsets of the channels c of the pixels (i, j) of image n; strides count vectors."""
    return ((n * strides[0] + i * strides[1] + j * strides[2]) * VEC)[:, None] + c[None, :]


@triton.jit
def _affine_act_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    x_strides,
    r_strides,
    y_strides,  # of image, row and pixel, in vectors
    H,
    W,
    CV: tl.int64,
    blocks,  # rows of an image, pixels of a row, vectors and blocks of channels
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    n, i, j, inside = tile_pixels(pid // blocks, H, W, BH, BW)
    c = (pid % blocks).to(tl.int64) * BC + tl.arange(0, BC)
    wanted = c < CV * VEC
    keep = inside[:, None] & wanted[None, :]

    z = tl.load(x_ptr + tile_offsets(x_strides, n, i, j, c, VEC), mask=keep, other=0.0).to(ACC)  # [BH*BW, BC]
    if HAS_SCALE:
        z *= tl.load(scale_ptr + c, mask=wanted, other=0.0).to(ACC)[None, :]
    if HAS_SHIFT:
        z += tl.load(shift_ptr + c, mask=wanted, other=0.0).to(ACC)[None, :]
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + tile_offsets(r_strides, n, i, j, c, VEC), mask=keep, other=0.0).to(ACC)
    y = activate(z, ACT).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + tile_offsets(y_strides, n, i, j, c, VEC), y, mask=keep)


@triton.jit
def _affine_act_grad_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    dx_ptr,
    dz_ptr,
    dscale_ptr,
    dshift_ptr,  # [splits, C] partial sums
    dy_strides,
    x_strides,
    r_strides,
    y_strides,
    dx_strides,
    dz_strides,  # of image, row and pixel, in vectors
    H,
    W,
    CV: tl.int64,
    blocks,  # rows of an image, pixels of a row, vectors and blocks of channels
    tiles,
    tiles_each,  # in all, and of one program
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DZ: tl.constexpr,
    SUMS: tl.constexpr,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    split = pid // blocks
    c = (pid % blocks).to(tl.int64) * BC + tl.arange(0, BC)
    wanted = c < CV * VEC
    if HAS_SCALE:
        scale = tl.load(scale_ptr + c, mask=wanted, other=0.0).to(ACC)[None, :]
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + c, mask=wanted, other=0.0).to(ACC)[None, :]

    dscale, dshift = tl.zeros((BH * BW, BC), ACC), tl.zeros((BH * BW, BC), ACC)
    for tile in range(split * tiles_each, tl.minimum(split * tiles_each + tiles_each, tiles)):
        n, i, j, inside = tile_pixels(tile, H, W, BH, BW)
        keep = inside[:, None] & wanted[None, :]
        dz = tl.load(dy_ptr + tile_offsets(dy_strides, n, i, j, c, VEC), mask=keep, other=0.0).to(ACC)  # [BH*BW, BC]
        if SUMS or (ACT != "none" and not HAS_Y):
            x = tl.load(x_ptr + tile_offsets(x_strides, n, i, j, c, VEC), mask=keep, other=0.0).to(ACC)
        if ACT != "none":
            if HAS_Y:
                z = tl.load(y_ptr + tile_offsets(y_strides, n, i, j, c, VEC), mask=keep, other=0.0).to(ACC)
            else:
                z = x
                if HAS_SCALE:
                    z *= scale
                if HAS_SHIFT:
                    z += shift
                if HAS_RESIDUAL:
                    z += tl.load(residual_ptr + tile_offsets(r_strides, n, i, j, c, VEC), mask=keep, other=0.0).to(ACC)
            dz *= slope(z, ACT)
        if HAS_DZ:
            at = tile_offsets(dz_strides, n, i, j, c, VEC)
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=keep)
        if HAS_DX:
            dx = dz
            if HAS_SCALE:
                dx *= scale
            at = tile_offsets(dx_strides, n, i, j, c, VEC)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)
        if SUMS:
            dscale += dz * x
            dshift += dz
    if SUMS:
        at = split.to(tl.int64) * (CV * VEC) + c
        tl.store(dscale_ptr + at, tl.sum(dscale, 0), mask=wanted)
        tl.store(dshift_ptr + at, tl.sum(dshift, 0), mask=wanted)


def _strides(x: Tensor | None) -> list[int]:
    """Strides of image, row and pixel, zero where there is but one."""
    if x is None:
        return [0, 0, 0]
    return [s if x.shape[d] > 1 else 0 for d, s in zip((0, 2, 3), spatial_strides(x), strict=True)]


def _counted(strides: list[list[int]], channels: int, itemsize: int) -> tuple[list[Strides], int]:
    vec = math.gcd(16 // itemsize, channels, *(v for s in strides for v in s))
    return [(n // vec, h // vec, w // vec) for n, h, w in strides], vec


def in_vectors(*maps: Tensor | None) -> tuple[list[Strides], int]:
    """Strides of image, row and pixel of each map, in vectors, and the elements of a vector: 16 bytes or fewer."""
    first = next(x for x in maps if x is not None)
    return _counted([_strides(x) for x in maps], first.shape[1], first.element_size())


def fold(
    *maps: Tensor | None, channels: bool, images: bool = True
) -> tuple[tuple[int, int, int, int], list[Strides], int]:
    """Join axes that follow one another in memory in all maps, so that what is left to iterate over is long runs.

    Args:
        channels: whether pixels may be joined to their channels.
        images: whether images may be joined to their rows.

    Returns:
        Numbers of images, rows, pixels, and vectors of a pixel; then as `in_vectors`.
    """
    first = next(x for x in maps if x is not None)
    n, c, h, w = first.shape
    sizes = [n, h, w, c]
    strides = [_strides(x) for x in maps]
    given = [s for s, x in zip(strides, maps, strict=True) if x is not None]
    for outer in range(0 if images else 1, 3 if channels else 2):
        inner = outer + 1
        if sizes[outer] == 1:
            continue
        if inner < 3 and sizes[inner] == 1:
            for s in given:
                s[inner] = s[outer]
        elif any(s[outer] != (*s, 1)[inner] * sizes[inner] for s in given):
            continue
        sizes[inner] *= sizes[outer]
        sizes[outer] = 1
        for s in given:
            s[outer] = 0
    counted, vec = _counted(strides, sizes[3], first.element_size())
    return (sizes[0], sizes[1], sizes[2], sizes[3] // vec), counted, vec


def tile_shape(h: int, w: int, channels: int, itemsize: int, rows: int = 1) -> tuple[int, int, int]:
    """Rows, columns and channels of a tile: two vectors of 16 bytes for each of 128 threads; some rows if they fit."""
    room = 1 << 16 if interpreting() else 128 * 2 * 16 // itemsize
    block_c = power_of_two(channels, 1, room)
    pixels = room // block_c
    block_h = power_of_two(h, 1, min(pixels, max(rows, pixels // power_of_two(w, 1, pixels))))
    return block_h, power_of_two(w, 1, pixels // block_h), block_c


def tiles_of(n: int, h: int, w: int, block: tuple[int, int, int]) -> int:
    """Tiles that cover the pixels of n images."""
    return n * triton.cdiv(h, block[0]) * triton.cdiv(w, block[1])


def tiles_per_program(tiles: int) -> int:
    """How many tiles one program sums: a few thousand programs, and so few terms that float32 holds their sum."""
    return min(256, triton.cdiv(tiles, 2 if interpreting() else 4096))


def launch_forward(
    x: Tensor,
    y: Tensor,
    act: str,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Write y = act(x * scale + shift + residual).

    Args:
        x, y, residual: windows of one size. y may be x or residual itself.
        scale, shift: (C,), dense, of any floating dtype.
    """
    if not x.numel():
        return
    per_channel = scale is not None or shift is not None
    (n, h, w, c), strides, vec = fold(x, residual, y, channels=not per_channel)
    block = tile_shape(h, w, c * vec, x.element_size())
    blocks = triton.cdiv(c * vec, block[2])
    _affine_act_kernel[(tiles_of(n, h, w, block) * blocks,)](
        x,
        scale,
        shift,
        residual,
        y,
        *strides,
        h,
        w,
        c,
        blocks,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        ACT=act,
        VEC=vec,
        BH=block[0],
        BW=block[1],
        BC=block[2],
        ACC=accumulator(x.dtype),
    )


def launch_backward(
    dy: Tensor,
    act: str,
    *,
    x: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    dx: Tensor | None = None,
    dz: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Write dx and dz, those that are given.

    Args:
        x, residual: what the forward read. x is needed for sums, and both are where the slope comes from z.
        y: what the forward wrote, where the slope comes from it (activations in MASKS).
        sums: whether to return dscale and dshift, (C,) in float32 (float64 for float64).
    """
    _, channels, _, _ = dy.shape
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    if not dy.numel():
        zeros = torch.zeros(2, channels, dtype=acc, device=dy.device)
        return (zeros[0], zeros[1]) if sums else None
    flat = scale is None and shift is None and not sums
    (n, h, w, c), strides, vec = fold(dy, x, residual, y, dx, dz, channels=flat)
    block = tile_shape(h, w, c * vec, dy.element_size())
    tiles, blocks = tiles_of(n, h, w, block), triton.cdiv(c * vec, block[2])
    each = tiles_per_program(tiles) if sums else 1
    splits = triton.cdiv(tiles, each)
    parts = torch.empty(2, splits, channels, dtype=acc, device=dy.device) if sums else None
    # Two vectors of three maps, of dz and of both sums are more than a thread has registers for: one of each then.
    warps = 8 if sums and residual is not None else 4
    _affine_act_grad_kernel[(splits * blocks,)](
        dy,
        x,
        scale,
        shift,
        residual,
        y,
        dx,
        dz,
        *((None, None) if parts is None else parts),
        *strides,
        h,
        w,
        c,
        blocks,
        tiles,
        each,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_Y=y is not None,
        HAS_DX=dx is not None,
        HAS_DZ=dz is not None,
        SUMS=sums,
        ACT=act,
        VEC=vec,
        BH=block[0],
        BW=block[1],
        BC=block[2],
        ACC=accumulator(dy.dtype),
        num_warps=warps,
    )
    return None if parts is None else tuple(parts.sum(1).unbind())  # pyright: ignore


def affine_act_reference(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, act: str
) -> Tensor:
    """y in plain PyTorch; autograd gives the rest."""
    z = x if scale is None else x * scale.reshape(-1, 1, 1)
    if shift is not None:
        z = z + shift.reshape(-1, 1, 1)
    if residual is not None:
        z = z + residual
    return activate_reference(z, act)


def act_grad_reference(dy: Tensor, gate: Tensor, act: str, residual: Tensor | None = None) -> Tensor:
    """dy * act'(gate + residual) in plain PyTorch."""
    return dy * slope_reference(gate if residual is None else gate + residual, act)


def _check(op: str, x: Tensor, act: str, *others: Tensor | None) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: no activation {act!r}; choose one of {', '.join(ACTIVATIONS)}")
    for other in others:
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{op}: maps of {tuple(x.shape)} and {tuple(other.shape)}; give maps of one size")


def _like(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return empty_map(n, c, h, w, x)


def _nhwc(x: Tensor | None) -> Tensor | None:
    return None if x is None else nhwc(x)


@torch.library.custom_op("gigamorph::act_grad", mutates_args=())
def act_grad(dy: Tensor, gate: Tensor, act: str, residual: Tensor | None = None) -> Tensor:
    """dy * act'(gate + residual).

    Args:
        gate: what the activation was applied to, or what it gave for an activation in MASKS.
        residual: added to gate as it is read; the backward of `add_act` need not store the sum.
    """
    _check("act_grad", dy, act, gate, residual)
    dy, gate, residual = nhwc(dy), nhwc(gate), _nhwc(residual)

    def ours() -> Tensor:
        dz = _like(dy)
        # The slope's argument is x + residual, or y: the same thing here.
        launch_backward(dy, act, x=gate, residual=residual, dz=dz)
        return dz

    def stock() -> Tensor:
        return nhwc(dy * slope_reference(gate if residual is None else gate + residual, act))

    return run_fastest("act_grad", dy, (act, residual is None), ours, stock)


@act_grad.register_fake
def _(dy: Tensor, gate: Tensor, act: str, residual: Tensor | None = None) -> Tensor:
    return _like(dy)


@torch.library.custom_op("gigamorph::add_act", mutates_args=())
def add_act(x: Tensor, residual: Tensor, act: str) -> Tensor:
    """act(x + residual); differentiable. Keeps y alone where y tells the slope, else x and residual."""
    _check("add_act", x, act, residual)
    y = _like(x)
    launch_forward(nhwc(x), y, act, residual=nhwc(residual))
    return y


@add_act.register_fake
def _(x: Tensor, residual: Tensor, act: str) -> Tensor:
    return _like(x)


def _add_act_context(ctx, inputs, output) -> None:
    x, residual, ctx.act = inputs
    ctx.save_for_backward(*([output] if ctx.act in MASKS else [] if ctx.act == "none" else [x, residual]))


def _add_act_backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    gate, residual = (*ctx.saved_tensors, None, None)[:2]
    dz = dy if gate is None else act_grad(dy, gate, ctx.act, residual)
    return dz, dz, None


add_act.register_autograd(_add_act_backward, setup_context=_add_act_context)


@torch.library.custom_op("gigamorph::affine_act", mutates_args=())
def affine_act(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """act(x * scale + shift + residual) with scale and shift of shape (C,); differentiable.

    Keeps y where y tells the slope, else x and residual; x too where scale or shift want a gradient.
    """
    _check("affine_act", x, act, residual)
    if scale.shape != (x.shape[1],) or shift.shape != (x.shape[1],):
        raise ValueError(
            f"affine_act: scale {tuple(scale.shape)} and shift {tuple(shift.shape)} for {x.shape[1]} channels; "
            f"give one number per channel"
        )
    y = _like(x)
    launch_forward(nhwc(x), y, act, scale=scale.contiguous(), shift=shift.contiguous(), residual=_nhwc(residual))
    return y


@affine_act.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    return _like(x)


@torch.library.custom_op("gigamorph::affine_act_backward", mutates_args=())
def affine_act_backward(
    dy: Tensor,
    x: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    act: str,
    sums: bool,
    wants_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz, dscale and dshift of `affine_act`; dz has no elements unless wanted, nor have the last two.

    Args:
        x, residual, y: as `launch_backward` needs them.
    """
    dx, dz = _like(dy), _like(dy) if wants_dz else _like(dy[:0])
    totals = launch_backward(
        nhwc(dy),
        act,
        x=_nhwc(x),
        scale=scale.contiguous(),
        shift=shift.contiguous(),
        residual=_nhwc(residual),
        y=_nhwc(y),
        dx=dx,
        dz=dz if wants_dz else None,
        sums=sums,
    )
    if totals is None:
        return dx, dz, scale.new_empty(0), shift.new_empty(0)
    return dx, dz, totals[0].to(scale.dtype, copy=True), totals[1].to(shift.dtype, copy=True)


@affine_act_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    act: str,
    sums: bool,
    wants_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = dy.shape[1] if sums else 0
    return _like(dy), _like(dy) if wants_dz else _like(dy[:0]), scale.new_empty(c), shift.new_empty(c)


def _affine_act_context(ctx, inputs, output) -> None:
    x, scale, shift, residual, ctx.act = inputs
    ctx.sums = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    by_y, by_z = ctx.act in MASKS, ctx.act not in MASKS and ctx.act != "none"
    ctx.save_for_backward(
        x if ctx.sums or by_z else None, scale, shift, residual if by_z else None, output if by_y else None
    )
    ctx.has_residual = residual is not None


def _affine_act_backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, residual, y = ctx.saved_tensors
    wants_dz = ctx.has_residual and ctx.act != "none"
    dx, dz, dscale, dshift = affine_act_backward(dy, x, scale, shift, residual, y, ctx.act, ctx.sums, wants_dz)
    dresidual = (dz if wants_dz else dy) if ctx.has_residual else None
    return dx, *((dscale, dshift) if ctx.sums else (None, None)), dresidual, None


affine_act.register_autograd(_affine_act_backward, setup_context=_affine_act_context)
