"""The private names of PyTorch that the kernels use; no other file of the kernels has one (tests/gates.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
else:
    try:
        from torch._subclasses.fake_tensor import FakeTensor
    except ImportError:
        FakeTensor = ()  # isinstance is False

NAMES = {
    "torch._subclasses.fake_tensor.FakeTensor": ("recognise tensors without memory", "recordings raise an error"),
    "torch.cuda._sleep": ("keep a GPU busy while calls are launched", "measured times include launches"),
}
"""Purpose of each name, and what happens if PyTorch does not have it."""


def keep_busy(cycles: int) -> None:
    """Let the current CUDA stream wait for a number of clock cycles."""
    wait: Any = getattr(torch.cuda, "_sleep", None)
    if wait is not None:
        wait(cycles)
