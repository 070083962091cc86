"""An exponential moving average of a network's weights and statistics, as timm's and MONAI's scripts keep one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """average = decay * average + (1 - decay) * weights after each optimizer step.

    The first steps count more: the decay is min(decay, (1 + n) / (10 + n)) at step n, or the random beginning would
    stay in it. Floating-point parameters and buffers are averaged, counters are those of the network.

    Args:
        stored: of `stored`, to go on with.
    """

    def __init__(self, module: nn.Module, decay: float, stored: dict[str, Any] | None = None) -> None:
        self.module, self.decay = module, decay
        own = self._own()
        self.steps = 0 if stored is None else int(stored["steps"])
        kept = own if stored is None else stored["values"]
        self.values = {name: kept[name].detach().to(value.device, copy=True) for name, value in own.items()}

    def _own(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.module.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of the network as those of one more step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        own = self._own()
        for name, value in self.values.items():
            value.lerp_(own[name].to(value.dtype), 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the network has the averaged values."""
        own = self._own()
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
        """For a checkpoint."""
        return {"steps": self.steps, "values": {name: value.cpu() for name, value in self.values.items()}}
