"""The gradient of an activation in one pass over memory, for slopes that no neighbouring kernel can apply:

    dz = dy * act'(gate)

The gate is the input of the activation, or its output if that determines the slope (ReLU, ReLU6).
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from .activations import check_activation, slope, slope_reference
from .choice import run_fastest
from .stream import SHARE, Share, Stream, load, step_pixels, store, whole
from .tiles import MOST_BLOCK_CHANNELS
from .triton_private import jit_kernel
from .windows import is_dense, map_like, nhwc


@jit_kernel(SHARE)
def _act_grad_kernel(
    dy,  # map [N, C, H, W]
    gate,  # map [N, C, H, W]
    dz,  # map [N, C, H, W]
    pixels,
    H,
    W,
    C,
    period,
    steps,
    ACT: tl.constexpr,
    TILE: tl.constexpr,
):
    """dz = dy * act'(gate) of a program's share of the pixels."""
    C = whole(C, TILE.VEC)
    share = Share(pixels, H, W, C, period, steps)
    c = tl.program_id(1) * TILE.BC + tl.arange(0, TILE.BC)
    for step in range(share.steps):
        p = step_pixels(share, step, TILE)
        keep = (p < share.pixels)[:, None] & (c < C)[None, :]
        d = load(dy, p, c, keep, share, TILE) * slope(load(gate, p, c, keep, share, TILE), ACT)
        store(dz, p, c, keep, d, share, TILE)


def launch_act_grad(dy: Tensor, gate: Tensor, act: str, dz: Tensor) -> None:
    """Write dz.

    Args:
        dy, gate, dz: (N, C, H, W) windows; dz may be dy or the gate.
    """
    if not dy.numel():
        return
    if is_dense(dy) and is_dense(gate) and is_dense(dz):  # contiguous elements, whatever the channels are
        width = math.gcd(dy.numel(), MOST_BLOCK_CHANNELS)
        dy, gate, dz = (t.permute(0, 2, 3, 1).view(1, 1, -1, width).permute(0, 3, 1, 2) for t in (dy, gate, dz))
    Stream("act_grad", MOST_BLOCK_CHANNELS, dy, gate, dz).launch(_act_grad_kernel, ACT=act)


@torch.library.custom_op("gigamorph::act_grad", mutates_args=())
def act_grad(dy: Tensor, gate: Tensor, act: str) -> Tensor:
    """dy * act'(gate).

    Args:
        gate: the input of the activation, or its output for an activation in MASKS.
    """
    check_activation("act_grad", act)
    if gate.shape != dy.shape:
        raise ValueError(f"act_grad: dy {tuple(dy.shape)} and gate {tuple(gate.shape)} must have the same shape")
    dy, gate = nhwc(dy), nhwc(gate)

    def ours() -> Tensor:
        dz = map_like(dy)
        launch_act_grad(dy, gate, act, dz)
        return dz

    return run_fastest("act_grad", dy, (act,), ours, lambda: nhwc(act_grad_reference(dy, gate, act)))


@act_grad.register_fake
def _(dy: Tensor, gate: Tensor, act: str) -> Tensor:
    return map_like(dy)


def act_grad_reference(dy: Tensor, gate: Tensor, act: str) -> Tensor:
    """dy * act'(gate) in plain PyTorch."""
    return dy * slope_reference(gate, act)
