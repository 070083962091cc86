"""Arithmetic for checks: no TF32, no autocast, and float64 where a forward requests float32 by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..torch_private import TorchDispatchMode


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32, autocast and similar settings; a Dirac convolution in TF32 would round its input to 10 bits."""
    backends: Any = torch.backends
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for s, old in zip(settings, before, strict=True):
            s.fp32_precision = old


@contextmanager
def in_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Let a network that was cast to float64 create and cast to float64 where its forward requests float32.

    This covers `x.float() / 255`, `torch.zeros(...)` and `dtype=torch.float32`. Other dtypes change nothing.
    """
    if dtype is not torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)


class _Doubles(TorchDispatchMode):
    """Dispatch mode, because a function mode would disable PyTorch's fast paths."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.ops.aten.lift_fresh.default and args[0].dtype == torch.float32:  # torch.tensor(an array)
            return args[0].double()
        return func(*args, **kwargs)
