"""Functions of torch.nn.functional that do not show a recording all that they do, made to."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from torch.nn import functional as F


def _of_parts(func: Any) -> Callable[..., Any]:
    """A function of torch.nn.functional that goes on to its parts, which are then seen, instead of being one call."""
    names = {**vars(F), "has_torch_function": lambda _: False, "has_torch_function_unary": lambda _: False}
    names["has_torch_function_variadic"] = lambda *_: False
    return types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)


# Written in Python of functions that are known.
OF_PARTS = {F.multi_head_attention_forward: _of_parts(F.multi_head_attention_forward)}


def with_weight(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `l1_loss`, which does not pass its weight on to function modes (torch 2.11 to 2.13)."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    return kwargs if weight is None or "weight" in kwargs else {**kwargs, "weight": weight}
