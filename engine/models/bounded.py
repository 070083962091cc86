"""A limit on the memory in which a network that a file names is built, derived from the file's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..torch_private import TorchDispatchMode

_FACTOR = 4  # allows for tables, masks, and tensors from which weights are drawn
_FREE = 2**27  # values
_TENSORS = 100_000


class bounded(TorchDispatchMode):  # noqa: N801
    """Context manager that refuses to allocate tensors whose total size far exceeds that of the weights.

    Args:
        weights: the weights that will be loaded into the network.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = _FACTOR * sum(value.numel() for value in weights.values()) + _FREE
        self._tensors = _FACTOR * len(weights) + _TENSORS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0] if args and isinstance(args[0], list | tuple) else ()
        if size and all(isinstance(one, int) for one in size):
            self._values -= max(0, math.prod(size))
            self._tensors -= 1
        if self._values < 0 or self._tensors < 0:
            raise DataError("it would be far larger than its weights; correct its arguments, or use another file")
        return func(*args, **(kwargs or {}))
