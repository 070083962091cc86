"""Constant tensors of rules, such as the indices and weights of inputs.

On a GPU they are made once and cached as long as the rule exists: a CUDA graph capture must not copy from the host, so
it reads the tensor that an earlier step made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ...torch_private import FakeTensor


class Constants:
    """The constant tensors of one rule for one op."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Tensor] = {}

    def numbers(self, values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`values` on the device of `like`; integers are int64 unless `dtype` is set."""
        return self.cached((tuple(values), dtype), like, lambda: torch.tensor(values, dtype=dtype))

    def cached(self, key: Hashable, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """The CPU tensor of `make` on the device of `like`; on a GPU it is cached under `key`."""
        if like.device.type == "cpu" or isinstance(like, FakeTensor):
            return make().to(like.device)
        at = key, like.device
        if at not in self._made:
            with torch.inference_mode(False):  # autograd may save it
                self._made[at] = make().to(like.device)
        return self._made[at]
