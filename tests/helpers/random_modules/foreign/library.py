"""Autograd functions as a library publishes them: the alias of `apply` is what others import."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GradientReversal(torch.autograd.Function):
    """The identity; its gradient is reversed, and scaled by an attribute of the class when the backward runs."""

    strength = 0.5

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.neg() * GradientReversal.strength


class LeakyStep(torch.autograd.Function):
    """A step; its gradient is that of a clipped line, from a saved tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype) + 0.1 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1).to(grad.dtype) * 1.5


class Gate(torch.autograd.Function):
    """A product of two tensors that broadcast; each gradient is twice what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        return 2 * grad * gate, 2 * (grad * x).sum_to_size(gate.shape)


reverse = GradientReversal.apply
step = LeakyStep.apply
gate = Gate.apply
