"""Gradient modes as ops: the effect of `torch.no_grad` on a call, as part of the program.

A call without gradients becomes the call and a `detach` of its results. A write without gradients changes values, but
not the graph: later readers get the new values, and gradients flow as if nothing had been written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, old: Tensor, new: Tensor):
        ctx.set_materialize_grads(False)
        return new.expand_as(old).clone()

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor):
        return grads[0], None


def straight_through(old: Tensor, new: Tensor) -> Tensor:
    """The values of `new` with the gradient of `old`."""
    return _StraightThrough.apply(old, new.detach())  # pyright: ignore[reportReturnType]
