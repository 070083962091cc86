"""Gradient modes as ops: what `torch.no_grad` does to a call, written into the program.

A call without gradients is the call and a `detach` of what it returns. A write without gradients changes values and not
the graph: whoever reads the tensor gets the new values, and the gradient goes on as if nothing had been written.
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
