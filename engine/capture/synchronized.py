"""Records a SyncBatchNorm as a BatchNorm that is marked with its process group.

Its own forward runs only on GPUs and calls collectives, which a tile cannot do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.overrides import handle_torch_function, has_torch_function

from ..parallel.processes import world
from ..torch_private import BatchNorm, resolve_process_group
from .recording_state import is_recorded

_lock = threading.Lock()
_open: list[Any] = []  # per open context, the original forward of SyncBatchNorm
_several: list[bool] = [False]  # whether other processes exist; Dynamo guards it


def shared(x: Tensor, name: str) -> Tensor:
    """Marks in a graph that the next BatchNorm shares its statistics in the process group with this name."""
    if has_torch_function((x,)):
        return handle_torch_function(shared, (x,), x, name)
    return x.view_as(x)


torch.compiler.allow_in_graph(shared)


def group_of(name: str) -> Any:
    """The process group with this name; None if it has a single process."""
    group = resolve_process_group(name)  # pyright: ignore[reportArgumentType]
    return group if dist.get_world_size(group) > 1 else None


@contextlib.contextmanager
def synchronized() -> Iterator[None]:
    """Let Dynamo record a SyncBatchNorm as a marked BatchNorm inside the `with` block."""
    with _lock:
        _open.append(_open[0] if _open else nn.SyncBatchNorm.forward)
        _several[0], nn.SyncBatchNorm.forward = world() > 1, _forward
    try:
        yield
    finally:
        with _lock:
            before = _open.pop()
            if not _open:
                nn.SyncBatchNorm.forward = before


def _forward(self: nn.SyncBatchNorm, input: Tensor) -> Tensor:
    if not is_recorded():
        return _open[0](self, input)
    if self.training and _several[0]:
        input = shared(input, _name_of(self.process_group))
    return BatchNorm.forward(self, input)


@torch.compiler.assume_constant_result
def _name_of(group: Any) -> str:
    return (group or dist.group.WORLD).group_name  # pyright: ignore[reportOptionalMemberAccess]
