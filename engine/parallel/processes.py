"""Processes of `torch.distributed` that work on one batch: statistics over the images of all of them.

Each collective here is called by all processes of its group in the same order, which is that of the steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import GigamorphError


def world() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Gather(torch.autograd.Function):
    """(*shape) of each process -> (processes, *shape), the same everywhere.

    A process's loss depends on what all have given, and autograd's root is the sum of the losses: the gradient of what
    a process has given is the sum over the processes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup):
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


Moments = tuple[Tensor, Tensor, Tensor]
"""Mean and biased variance, (C,), and the number of values, a scalar."""


def merged(parts: Sequence[tuple[Tensor, ...]], group: dist.ProcessGroup | None) -> Moments:
    """The moments of all values together, of those of parts (images of several sizes), and of all processes' parts.

    How many values a part has, and how many parts a process, need not be the same.
    """
    mean, var, count = parts[0] if len(parts) == 1 else _pooled(torch.stack([_row(*part) for part in parts]))
    if group is not None:
        mean, var, count = _pooled(Gather.apply(_row(mean, var, count), group))  # pyright: ignore[reportArgumentType]
    return mean, var, count


def _row(mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
    return torch.cat([mean, var, count.reshape(1)])


def _pooled(table: Tensor) -> Moments:
    """The moments of all values, of a row for each part (Chan, Golub and LeVeque)."""
    channels = (table.shape[1] - 1) // 2
    means, variances, counts = table.split([channels, channels, 1], 1)
    counts = counts.detach()
    shares = counts / counts.sum()
    total = (shares * means).sum(0)
    return total, (shares * (variances + (means - total).square())).sum(0), counts.sum()


def check_same(group: dist.ProcessGroup, what: str, device: torch.device, error: str) -> None:
    """Refuse what is not the same in all processes of a group: they would wait for each other forever.

    Raises:
        GigamorphError: with this text, in all processes alike.
    """
    mark = torch.tensor([zlib.crc32(what.encode())], device=device)
    marks = [torch.empty_like(mark) for _ in range(dist.get_world_size(group))]
    dist.all_gather(marks, mark, group=group)
    if len({int(m) for m in marks}) > 1:
        raise GigamorphError(error)


def check_same_steps(groups: Iterable[dist.ProcessGroup], steps: str, device: torch.device) -> None:
    """Refuse a step whose processes would call their collectives in different orders, of which `steps` tells."""
    for group in groups:
        check_same(
            group,
            steps,
            device,
            "the plans of processes that share BatchNorm's statistics store different maps, so they would wait for "
            "each other forever; give all of them the same memory_budget and images of one size, or more memory",
        )
