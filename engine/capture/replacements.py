"""Replacements for torch functions in a recording: some hide their ops, others are slow or fail on fake tensors."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..torch_private import BEFORE_2_13, FakeTensor, TorchDispatchMode

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_BATCH_FIRST = 8  # the last argument of (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, ...)


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


class _InRange(TorchDispatchMode):
    """Answers comparisons with true: PyTorch 2.11 checks that a quantile is between 0 and 1, which needs its value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.ops.aten.equal.default else func(*args, **(kwargs or {}))


def _recorded(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def quantile(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _InRange() if isinstance(input, FakeTensor) else contextlib.nullcontext():
            return func(input, *args, **kwargs)

    quantile.__name__, quantile.__module__ = func.__name__, "torch"  # rules find it by this name
    return quantile


_ALL = (torch.quantile, torch.nanquantile, Tensor.quantile, Tensor.nanquantile)
QUANTILES = {func: _recorded(func) for func in _ALL} if BEFORE_2_13 else {}


def of_one_step(name: str, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """The result of a recurrent layer, computed from the first step of its sequences; None for other calls.

    One step determines the shapes of all, where PyTorch would compute every step.
    """
    if name not in RECURRENT or kwargs or len(args) != _BATCH_FIRST + 1 or not isinstance(args[3], bool):
        return None
    x, axis = args[0], int(args[_BATCH_FIRST])
    if x.dim() != 3 or x.shape[axis] < 2:
        return None
    output, *states = func(x.narrow(axis, 0, 1), *args[1:])
    steps = output.transpose(0, axis).expand(x.shape[axis], -1, -1).clone(memory_format=torch.contiguous_format)
    return (steps.transpose(0, axis), *states)
