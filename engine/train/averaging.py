"""An exponential moving average of a network's weights and statistics, as in the scripts of timm and MONAI."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """The average of a network's weights: average = decay * average + (1 - decay) * weights after each optimizer step.

    The first steps count more: the decay at step n is min(decay, (1 + n) / (10 + n)), or the random initial weights
    would dominate. Floating-point parameters and buffers are averaged; counters are taken from the network.

    Args:
        module: the network, which is read at each `update`.
        decay: in [0, 1).
        stored: the result of `stored` in an earlier run, to continue from it.
    """

    def __init__(self, module: nn.Module, decay: float, stored: dict[str, Any] | None = None) -> None:
        self.module, self.decay = module, decay
        own = self._floating_values()
        self.steps = 0 if stored is None else int(stored["steps"])
        start = own if stored is None else stored["values"]
        self.values = {name: start[name].detach().to(value.device, copy=True) for name, value in own.items()}

    def _floating_values(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.module.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Include the network's current weights, after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        own = self._floating_values()
        for name, value in self.values.items():
            value.lerp_(own[name].to(value.dtype), 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Context in which the network has the averaged values."""
        own = self._floating_values()
        former = {name: value.clone() for name, value in own.items()}
        try:
            with torch.no_grad():
                for name, value in own.items():
                    value.copy_(self.values[name])
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    value.copy_(former[name])

    def stored(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"steps": self.steps, "values": {name: value.cpu() for name, value in self.values.items()}}
