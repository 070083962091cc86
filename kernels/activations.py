"""Activations in the epilogues of kernels, and their slopes for the prologue of a backward.

    y = act(z),   dz = dy * act'(z)

The slopes of ReLU and ReLU6 follow from y, so only y is saved; SiLU, GELU and hard-swish need z.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu", "hardswish")
# Their slope is 0 or 1 and follows from the output; applying it twice changes nothing.
MASKS = frozenset({"relu", "relu6"})


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z); `z` in float32 or float64. NaN stays NaN, as in PyTorch: tl.maximum would hide it."""
    if ACT == "relu":
        y = tl.where(z <= 0.0, 0.0, z)
    elif ACT == "relu6":
        y = tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))
    elif ACT == "silu":
        y = z / (1.0 + tl.exp(-z))
    elif ACT == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "hardswish":
        y = z * tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 6.0, z + 3.0)) / 6.0
    else:
        y = z
    return y


@triton.jit
def slope(m, ACT: tl.constexpr):
    """act'(z) in the dtype of `m`, which is z, or y for an activation in MASKS."""
    if ACT == "relu":
        d = tl.where(m <= 0.0, 0.0, 1.0)
    elif ACT == "relu6":
        d = tl.where((m <= 0.0) | (m >= 6.0), 0.0, 1.0)
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-m))
        d = s * (1.0 + m * (1.0 - s))
    elif ACT == "gelu":
        d = 0.5 * (1.0 + tl.erf(m * 0.7071067811865476)) + m * 0.3989422804014327 * tl.exp(-0.5 * m * m)
    elif ACT == "hardswish":
        d = tl.where(m <= -3.0, 0.0, tl.where(m < 3.0, m / 3.0 + 0.5, 1.0))
    else:
        d = tl.full(m.shape, 1.0, m.dtype)
    return d.to(m.dtype)


def check_activation(op: str, act: str) -> None:
    """Refuse an activation that the kernels do not have."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {act!r}; use one of {', '.join(ACTIVATIONS)}")


def activate_reference(z: Tensor, act: str) -> Tensor:
    """act(z) in plain PyTorch."""
    if act == "none":
        return z
    return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish}[act](z)


def slope_reference(m: Tensor, act: str) -> Tensor:
    """act'(z) in plain PyTorch, from z, or from y for an activation in MASKS."""
    if act == "relu":
        d = ~(m <= 0)
    elif act == "relu6":
        d = ~((m <= 0) | (m >= 6))
    elif act == "silu":
        s = torch.sigmoid(m)
        d = s * (1 + m * (1 - s))
    elif act == "gelu":
        d = 0.5 * (1 + torch.erf(m * 0.5**0.5)) + m * torch.exp(-0.5 * m * m) * (2 * torch.pi) ** -0.5
    elif act == "hardswish":
        d = torch.where(m <= -3, 0, torch.where(m < 3, m / 3 + 0.5, 1))
    else:
        d = torch.ones_like(m)
    return d.to(m.dtype)
