"""Corrected versions of calls whose CPU gradients are wrong in PyTorch 2.13 for some memory formats.

A map of one image, or one pixel wide, counts as both channels-last and contiguous, because dimensions of size one have
no order. PyTorch's backward of batch_norm then reads the gradient in one format and the map in the other. It is right
if the gradient has the map's format (`memory_format`). instance_norm is batch_norm of one image; it is right if map and
gradient are both contiguous. The backward of max_unpool2d needs contiguous indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a map."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def batch_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.batch_norm` with the right gradient; its momentum may be a tensor."""
    args = tuple(float(a) if n == 5 else a for n, a in enumerate(args))
    kwargs = {name: float(a) if name == "momentum" else a for name, a in kwargs.items()}
    return _ordered(F.batch_norm(input, *args, **kwargs), memory_format(input))


def instance_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.instance_norm` with the right gradient."""
    if input.device.type != "cpu":
        return F.instance_norm(input, *args, **kwargs)
    return _ordered(F.instance_norm(input.contiguous(), *args, **kwargs), torch.contiguous_format)


def max_unpool2d(input: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.max_unpool2d` with the right gradient for indices in any memory format."""
    return F.max_unpool2d(input, indices.contiguous(), *args, **kwargs)


def _ordered(result: Tensor, order: torch.memory_format) -> Tensor:
    if result.requires_grad and result.device.type == "cpu":
        result.register_hook(lambda grad: grad.contiguous(memory_format=order))
    return result


CORRECTED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.max_unpool2d: max_unpool2d,
}
