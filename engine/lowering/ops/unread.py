"""Rule of `with_zeros`: a result with zero gradients for parameters that lowering no longer reads.

An example is a token that is joined and cut off again. PyTorch gives its parameters zeros, not None, and optimizers
treat them differently: with zeros they decay a weight and its momentum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...capture.program import Op
from .base import Block, Env, Local, Maps, rule


class _WithZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *unread: Tensor) -> Tensor:
        ctx.unread = [t.detach() for t in unread]  # not saved: their values are not needed, so they may change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *map(torch.zeros_like, ctx.unread)


def with_zeros(x: Tensor, *unread: Tensor) -> Tensor:
    """The same tensor; its backward returns zeros for the tensors in `unread`."""
    return _WithZeros.apply(x, *unread)  # pyright: ignore[reportReturnType]


@rule("with_zeros")
def of_a_map(op: Op, maps: Maps) -> Local:
    value, *unread = op.inputs

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (with_zeros(env[value], *(env[v] for v in unread)),)

    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), run)
