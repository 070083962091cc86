"""Functions of torch that do not show a recording all that they do, made to."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _of_parts(func: Any) -> Callable[..., Any]:
    """A function of torch.nn.functional that goes on to its parts, which are then seen, instead of being one call."""
    names = {**vars(F), "has_torch_function": lambda _: False, "has_torch_function_unary": lambda _: False}
    names["has_torch_function_variadic"] = lambda *_: False
    return types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A product, its factor and a sum, as attention in tiles is made of; what beta leaves out is not read."""
    found = torch.bmm(batch1, batch2)
    if alpha != 1:
        found = found * alpha
    if beta == 0:
        return found
    base = input if input.dtype == found.dtype else input.to(found.dtype)  # by autocast
    return found + (base if beta == 1 else base * beta)


# Written in Python of functions that are known.
OF_PARTS = {
    F.multi_head_attention_forward: _of_parts(F.multi_head_attention_forward),
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
}


def with_weight(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `l1_loss`, which does not pass its weight on to function modes (torch 2.11 to 2.13)."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    return kwargs if weight is None or "weight" in kwargs else {**kwargs, "weight": weight}
