"""The backward of a norm in training whose statistics are those of the very pixels that it has normalised:

    dz = dy * act'(z),   dbias = sum dz,   dweight = sum dz * xhat      with y, z and xhat as in `batch_norm.py`
    dx = rstd * (weight * dz - a / n - xhat * b / n)                    n values of a channel, or group of channels
    a = sum weight * dbias,   b = sum weight * dweight                  of the channels of a group

(Ioffe and Szegedy, 2015, section 3; Wu and He, 2018, for groups.) Two passes over memory: the first writes dz where a
residual wants it and nothing else, the second reads that, or dy again. In pieces, with sums that other tiles have a
part in, a pass more is needed: what `normalize_act_gradients` gives of the pieces, and what `moments_backward` adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import slope
from .batch_norm import (
    affine,
    gradient_maps,
    launch_normalize_act_gradients,
    norm_stream,
    normalize_act_gradients_reference,
    normalize_act_reference,
    other_dtypes,
    stock_gradients,
)
from .choice import run_fastest
from .dtypes import sum_dtype
from .stream import channel, dense, load, step_pixels, store, whole
from .windows import nhwc


@triton.jit(do_not_specialize=["count"])
def _live_norm_kernel(
    x,  # map [N, C, H, W]
    dy,  # map [N, C, H, W]
    gate,  # map [N, C, H, W] or None
    dx,  # map [N, C, H, W]
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    pulls_ptr,  # [2, C], a and b of each channel's group
    count,
    share,
    ACT: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx of a program's share of the pixels, given the sums of all."""
    c = tl.program_id(1) * TILE.BC + tl.arange(0, TILE.BC)
    C = whole(share.C, TILE.VEC)
    mean, rstd, scale, bias = affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, C, TILE.BC, TILE.ACC)
    shift = rstd * channel(pulls_ptr, c, C, TILE.ACC) / count.to(TILE.ACC)
    tilt = rstd * rstd * channel(pulls_ptr + C, c, C, TILE.ACC) / count.to(TILE.ACC)
    for step in range(share.steps):
        p = step_pixels(share, step, TILE)
        keep = (p < share.pixels)[:, None] & (c < C)[None, :]
        centred = load(x, p, c, keep, share, TILE) - mean
        z = centred * scale + bias if gate.ptr is None else load(gate, p, c, keep, share, TILE)
        d = load(dy, p, c, keep, share, TILE) * slope(z, ACT)
        store(dx, p, c, keep, scale * d - shift - centred * tilt, share, TILE)


def launch_live_norm_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    together: int,
    dx: Tensor,
    dz: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Write dx, and dz if given; return dbias and dweight. Arguments as for `launch_normalize_act_gradients`."""
    sums = launch_normalize_act_gradients(dy, x, mean, rstd, weight, bias, gate, act, None, dz)
    if x.numel():
        if dz is not None:
            dy, gate, act = dz, None, "none"
        s = norm_stream("live_norm_gradients", act, x, dy, gate, dx)
        vectors, count = dense(mean, rstd, weight, bias, _pulls(sums, weight, together)), s.share.pixels * together
        _live_norm_kernel[s.grid](*s.maps, *vectors, count, s.share, ACT=act, TILE=s.tile, num_warps=s.num_warps)
    return sums


def _pulls(sums: tuple[Tensor, Tensor], weight: Tensor | None, together: int) -> Tensor:
    """a and b of each channel's group, (2, C)."""
    both = torch.stack(sums) if weight is None else torch.stack(sums) * weight
    if together == 1:
        return both
    return both.unflatten(1, (-1, together)).sum(2, keepdim=True).expand(-1, -1, together).flatten(1)


@torch.library.custom_op("gigamorph::live_norm_gradients", mutates_args=())
def live_norm_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    keep_dz: bool,
    together: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx with all that x does to the statistics, dz (empty unless `keep_dz`), dbias and dweight.

    Args:
        dy, x, gate: as for `launch_normalize_act_gradients`; dx has x's dtype, dz that of dy.
        mean, rstd: of x, (C,).
        together: neighbouring channels that share statistics; more than one only of one image.
    """
    dy, x, gate = nhwc(dy), nhwc(x), None if gate is None else nhwc(gate)

    def ours() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx, dz = gradient_maps(dy, x, keep_dz)
        given = dy, x, mean, rstd, weight, bias, gate, act, together
        sums = launch_live_norm_gradients(*given, dx, dz if keep_dz else None)
        return dx, dz, *sums

    def stock() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return stock_gradients(dy, x, mean, rstd, weight, bias, gate, act, keep_dz, together)

    settings = (weight is None, bias is None, gate is None, act, keep_dz, together > 1, *other_dtypes(x, dy, gate))
    return run_fastest("live_norm_gradients", x, settings, ours, stock) if x.numel() else ours()


@live_norm_gradients.register_fake
def _(dy, x, mean, rstd, weight, bias, gate, act, keep_dz, together=1):
    dbias, dweight = (x.new_empty(x.shape[1], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return *gradient_maps(dy, x, keep_dz), dbias, dweight


def live_norm_gradients_reference(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    act: str,
    together: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz, dbias and dweight in plain PyTorch."""
    dx, dz, dbias, dweight = normalize_act_gradients_reference(dy, x, mean, rstd, weight, bias, gate, act)
    count = x.numel() // x.shape[1] * together
    xhat = normalize_act_reference(x, mean, rstd, None, None, None, "none")[0]
    a, b = _pulls((dbias, dweight), weight, together).unflatten(1, (-1, 1, 1))
    return dx - rstd.reshape(-1, 1, 1) * (a + xhat * b) / count, dz, dbias, dweight
