"""Quantiles of tensors without values, which PyTorch 2.11 cannot make on the CPU.

That version asks there whether what is sought lies between 0 and 1, which takes a value; 2.13 does not. Of tensors with
values it asks itself.
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
    """Says yes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.ops.aten.equal.default else func(*args, **(kwargs or {}))


def _recorded(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def quantile(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _InRange() if is_fake(input) else contextlib.nullcontext():
            return func(input, *args, **kwargs)

    quantile.__name__, quantile.__module__ = func.__name__, "torch"  # by which it is known
    return quantile


_ALL = (torch.quantile, torch.nanquantile, Tensor.quantile, Tensor.nanquantile)
QUANTILES = {} if torch.__version__ >= "2.13" else {func: _recorded(func) for func in _ALL}
