"""Replacements for torch functions that hide some of their ops from a recording."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _without_dispatch(func: Any) -> Callable[..., Any]:
    """A function of torch.nn.functional that records its inner calls, instead of itself as one call."""
    names = {**vars(F), "has_torch_function": lambda _: False, "has_torch_function_unary": lambda _: False}
    names["has_torch_function_variadic"] = lambda *_: False
    return types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`torch.baddbmm` as a product, its factor and a sum, as tiled attention needs; with beta=0 `input` is not read."""
    found = torch.bmm(batch1, batch2)
    if alpha != 1:
        found = found * alpha
    if beta == 0:
        return found
    base = input if input.dtype == found.dtype else input.to(found.dtype)  # by autocast
    return found + (base if beta == 1 else base * beta)


# Written in Python with functions that have rules.
OF_PARTS = {
    F.multi_head_attention_forward: _without_dispatch(F.multi_head_attention_forward),
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
