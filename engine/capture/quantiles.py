"""Quantiles of fake tensors, which PyTorch 2.11 cannot compute on the CPU.

That version checks that the quantile is between 0 and 1, which needs a value; 2.13 does not. For tensors with values
the check still runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode


class _InRange(TorchDispatchMode):
    """Answers comparisons with true."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.ops.aten.equal.default else func(*args, **(kwargs or {}))


def _recorded(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def quantile(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _InRange() if is_fake(input) else contextlib.nullcontext():
            return func(input, *args, **kwargs)

    quantile.__name__, quantile.__module__ = func.__name__, "torch"  # rules find it by this name
    return quantile


_ALL = (torch.quantile, torch.nanquantile, Tensor.quantile, Tensor.nanquantile)
QUANTILES = {} if torch.__version__ >= "2.13" else {func: _recorded(func) for func in _ALL}
