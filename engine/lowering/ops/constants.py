"""Tensors of numbers that a rule knows: which inputs are taken, and their weights.

On a GPU they are made once and kept as long as the rule: a capture as a CUDA graph may not copy from the host. It reads
what an earlier step has made, where that lies.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Constants:
    """The tensors of one rule for one op."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Tensor] = {}

    def numbers(self, values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`values` on the device of `like`; whole numbers are 64 bits wide unless a dtype is given."""
        return self.kept((tuple(values), dtype), like, lambda: torch.tensor(values, dtype=dtype))

    def kept(self, key: Hashable, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, a tensor on the CPU, on the device of `like`: there always the same for one key."""
        if like.device.type == "cpu" or isinstance(like, FakeTensor):
            return make().to(like.device)
        at = key, like.device
        if at not in self._made:
            with torch.inference_mode(False):  # autograd may keep it
                self._made[at] = make().to(like.device)
        return self._made[at]
