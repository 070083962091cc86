"""What CUDA graphs are to tests on the CPU: functions that are called again, watched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A graph repeats work on the device: not what the host makes, nor what depends on what it reads.
FROM_HOST = {"aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero", "aten.item", "aten.masked_select"}


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Watch(TorchDispatchMode):
    """Fails on ops that a CUDA graph could not repeat with new inputs."""

    sees_tiles = True

    def __init__(self, allowed: set[int]):
        super().__init__()
        self.allowed = allowed
        self.made: list[Tensor] = []  # held, so that no storage's address is given away twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        assert name not in FROM_HOST, f"{name} cannot be captured"
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.dim():  # numbers are wrapped in tensors without dimensions
                assert storage(tensor) in self.allowed, f"{name} reads a tensor that is not static: {tensor.shape}"
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.made.append(tensor)
                self.allowed.add(storage(tensor))
        return result


def poison(tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point:
        tensor.fill_(torch.nan)
    elif tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
