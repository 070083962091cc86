"""The state of a network before a call, for a call that is refused after a part of it has run."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn

_CONTAINERS = (list, dict, set, deque)


class Rollback:
    """Attributes of modules, items of containers in them, values of buffers, and the random numbers of the CPU.

    Args:
        network: None if the call has none.
    """

    def __init__(self, network: nn.Module | None):
        modules = [] if network is None else [*network.modules()]
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        self._items = [
            (value, dict(value) if isinstance(value, dict) else list(value))
            for _, attributes in self._attributes
            for value in attributes.values()
            if isinstance(value, _CONTAINERS)
        ]
        buffers = [] if network is None else [*network.buffers()]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]
        self._random = torch.get_rng_state()

    def undo(self) -> None:
        """Bring back what it was when this object was made."""
        for own, before in self._attributes:
            _refill(own, before)
        for value, before in self._items:
            _refill(value, before)
        with torch.no_grad():
            for buffer, before in self._buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        torch.set_rng_state(self._random)


def _refill(container: Any, items: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(items)
