"""Running statistics of BatchNorm over distributed batches, equal to those of a single process; averaged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..parallel.process_group import ProcessGroup
from ..torch_private import BatchNorm


class RunningStatistics:
    """Merges the running means and variances of all processes, as if one process had computed the batches in order.

    DDP would use only the first process's batches. A batch changes a running value r to a * r + s, where s depends on
    its pixels. All processes start from the same r, so the s of all batches can be recovered and added in the order of
    the batches. Layers that exchange statistics themselves (SyncBatchNorm) are not changed.
    """

    def __init__(self, net: nn.Module, group: ProcessGroup) -> None:
        layers = [m for m in net.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
        self._norms = [m for m in layers if not isinstance(m, nn.SyncBatchNorm)] if group.at_once > 1 else []
        self._group = group
        self._layers: list[Any] = []
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Call before a batch."""
        self._layers = [layer for layer in self._norms if layer.training]
        self._before = self._values()

    @torch.no_grad()
    def merge(self, counts: bool) -> None:
        """Call after a batch and its backward, which may read the forward's statistics; a collective.

        Args:
            counts: whether this process's batch is not a repetition.
        """
        if not self._layers:
            return
        mine = torch.cat(self._values() if counts else self._before)
        found = [torch.empty_like(mine) for _ in range(self._group.size)]
        dist.all_gather(found, mine)
        batches = [one.split([len(values) for values in self._before]) for one in found[:: self._group.together]]
        for number, (layer, before) in enumerate(zip(self._layers, self._before, strict=True)):
            values = before
            for batch in batches:
                values = _after(values, before, batch[number], layer.momentum)
            mean, var = values[1:].chunk(2)
            layer.num_batches_tracked.copy_(values[0])
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)

    def _values(self) -> list[Tensor]:
        """The number of batches, running means and running variances of each layer, (1 + 2 * channels,)."""
        parts = ((m.num_batches_tracked.reshape(1), m.running_mean, m.running_var) for m in self._layers)
        return [torch.cat([part.double() for part in own]) for own in parts]


def _after(values: Tensor, before: Tensor, found: Tensor, momentum: float | None) -> Tensor:
    """`values` after the batch that changed `before` to `found`."""
    times, seen = found[0] - before[0], values[0]
    if momentum is None:  # means over all batches
        total = (seen + times).clamp(min=1)
        new = (seen * values + (before[0] + times) * found - before[0] * before) / total
        new = torch.where(times > 0, new, values)
    else:
        factor = (1 - momentum) ** times
        new = factor * (values - before) + found
    return torch.cat([(seen + times).reshape(1), new[1:]])


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
        former = {name: value.clone() for name, value in self._floating_values().items()}
        try:
            self.module.load_state_dict(self.values, strict=False)
            yield
        finally:
            self.module.load_state_dict(former, strict=False)

    def stored(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"steps": self.steps, "values": {name: value.cpu() for name, value in self.values.items()}}
