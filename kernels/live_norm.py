"""The second pass of the gradient of a norm in training mode whose statistics are those of the given pixels:

    dz = dy * act'(z),   dbias = sum dz,   dweight = sum dz * xhat      the first pass, as in batch_norm.py
    dx = rstd * (weight * dz - a / n - xhat * b / n)                    n values of a channel, or group of channels
    a = sum weight * dbias,   b = sum weight * dweight                  of the channels of a group

(Ioffe and Szegedy, 2015, section 3; Wu and He, 2018, for groups.) The first pass writes dz only if a residual needs it,
and the second reads dz, or dy again. If other tiles contribute to the statistics, another pass is needed:
`normalize_act_gradients` processes the tiles, and `moments_backward` adds the gradients of the statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import slope
from .channel_affine import affine
from .stream import SHARE, Share, Stream, channel, dense, load, step_pixels, store, whole
from .tiles import MOST_BLOCK_CHANNELS


@triton.jit(do_not_specialize=["count", *SHARE])
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
    """Write dx, given `sums`, dbias and dweight; `together` channels share statistics.

    The other arguments are those of `launch_normalize_act_gradients`.
    """
    if x.numel():
        s = Stream("normalize_act_gradients", MOST_BLOCK_CHANNELS, x, dy, gate, dx, fold=True)
        a, b = group_sums(sums, weight, together) if together > 1 else sums
        vectors, count = dense(mean, rstd, weight, bias, a, b, plus), s.pixels * together
        _live_norm_kernel[s.grid](
            *s.maps, *vectors, count, *s.share, GROUPS=together > 1, ACT=act, TILE=s.tile, num_warps=s.num_warps
        )


def group_sums(sums: tuple[Tensor, Tensor], weight: Tensor | None, together: int) -> Tensor:
    """a and b of each channel's group, (2, C)."""
    both = torch.stack(sums) if weight is None else torch.stack(sums) * weight
    if together == 1:
        return both
    return both.unflatten(1, (-1, together)).sum(2, keepdim=True).expand(-1, -1, together).flatten(1)
