"""Dtypes in which kernels compute and sum."""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype that a kernel computes and sums in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of stored sums over pixels, such as gradients of weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promoted(*parts: torch.dtype | Tensor | None) -> torch.dtype:
    """The promoted dtype of all arguments."""
    dtypes = [part if isinstance(part, torch.dtype) else part.dtype for part in parts if part is not None]
    return functools.reduce(torch.promote_types, dtypes)
