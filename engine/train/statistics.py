"""Running statistics of BatchNorms whose batches are dealt to several processes: those of one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..parallel.process_group import ProcessGroup

_NORM = nn.modules.batchnorm._BatchNorm


class RunningStatistics:
    """What the batches of all processes leave in running means and variances, as if one had computed them in turn.

    DDP keeps those of the first process's batches alone, which a later stage or the score would see. A batch makes
    keep * r + s of a running value r, with s of its own pixels: from what each process has made of the same r the s of
    all batches follow, and are added in the order of the batches. Layers that exchange statistics themselves
    (SyncBatchNorm) are left as they are.
    """

    def __init__(self, net: nn.Module, group: ProcessGroup) -> None:
        layers = [m for m in net.modules() if isinstance(m, _NORM) and m.running_mean is not None]
        self._all = [m for m in layers if not isinstance(m, nn.SyncBatchNorm)] if group.at_once > 1 else []
        self._group = group
        self._layers: list[Any] = []
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Call before a batch."""
        self._layers = [layer for layer in self._all if layer.training]
        self._before = self._values()

    @torch.no_grad()
    def merge(self, counts: bool) -> None:
        """Call after a batch and its backward, which may read what the forward has left; a collective.

        Args:
            counts: whether this process's batch is not one that it repeats.
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
        """Of each layer (1 + 2 * channels,): the number of batches that it has seen, running means and variances."""
        parts = ((m.num_batches_tracked.reshape(1), m.running_mean, m.running_var) for m in self._layers)
        return [torch.cat([part.double() for part in own]) for own in parts]


def _after(values: Tensor, before: Tensor, found: Tensor, momentum: float | None) -> Tensor:
    """`values` after a batch that has made `found` of `before`."""
    times, seen = found[0] - before[0], values[0]
    if momentum is None:  # means over all batches
        total = (seen + times).clamp(min=1)
        new = (seen * values + (before[0] + times) * found - before[0] * before) / total
        new = torch.where(times > 0, new, values)
    else:
        kept = (1 - momentum) ** times
        new = kept * (values - before) + found
    return torch.cat([(seen + times).reshape(1), new[1:]])
