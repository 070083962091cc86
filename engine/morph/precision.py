"""Arithmetic as a check wants it: no TF32, no autocast, and float64 where a forward asks for float32 by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def full_precision() -> Iterator[None]:
    """TF32, autocast and the like off: a Dirac convolution in TF32 rounds its input to 10 bits."""
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
    """For a network that was cast to float64: tensors that its forward makes or casts to float32 are float64 too.

    `x.float() / 255`, `torch.zeros(...)`, `dtype=torch.float32`; nothing is changed for other dtypes.
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
    """At this level PyTorch's fast paths stay open, which a function mode closes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.ops.aten.lift_fresh.default and args[0].dtype == torch.float32:  # torch.tensor(an array)
            return args[0].double()
        return func(*args, **kwargs)
