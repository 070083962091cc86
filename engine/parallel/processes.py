"""Statistics over the images of all processes of `torch.distributed` that work on one batch.

All processes of a group must call the collectives in the same order, which is the order of the steps.
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


class GatherFunction(torch.autograd.Function):
    """Gathers a tensor (*shape) from each process into (processes, *shape), equal in all processes.

    The loss of each process depends on all gathered tensors, and the total loss is the sum over the processes. So the
    gradient of a process's tensor is the sum of its gradients in all processes.
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
    """Merge the moments of parts (images of several sizes) over all parts and processes.

    Parts may have different numbers of values, and processes different numbers of parts.
    """
    mean, var, count = parts[0] if len(parts) == 1 else _pooled(torch.stack([_row(*part) for part in parts]))
    if group is not None:
        mean, var, count = _pooled(GatherFunction.apply(_row(mean, var, count), group))  # pyright: ignore[reportArgumentType]
    return mean, var, count


def _row(mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
    return torch.cat([mean, var, count.reshape(1)])


def _pooled(table: Tensor) -> Moments:
    """The moments of all values from a table with one row per part (Chan, Golub and LeVeque)."""
    channels = (table.shape[1] - 1) // 2
    means, variances, counts = table.split([channels, channels, 1], 1)
    counts = counts.detach()
    shares = counts / counts.sum()
    total = (shares * means).sum(0)
    return total, (shares * (variances + (means - total).square())).sum(0), counts.sum()


def check_same(group: dist.ProcessGroup, what: str, device: torch.device, error: str) -> None:
    """Raise an error if `what` differs between the processes of a group, because they would deadlock.

    Raises:
        GigamorphError: with the text `error`, in all processes.
    """
    mark = torch.tensor([zlib.crc32(what.encode())], device=device)
    marks = [torch.empty_like(mark) for _ in range(dist.get_world_size(group))]
    dist.all_gather(marks, mark, group=group)
    if len({int(m) for m in marks}) > 1:
        raise GigamorphError(error)


def check_same_steps(groups: Iterable[dist.ProcessGroup], steps: str, device: torch.device) -> None:
    """Raise an error if the processes would call collectives in different orders; `steps` describes the order."""
    for group in groups:
        check_same(
            group,
            steps,
            device,
            "the plans of processes that share BatchNorm statistics store different maps, so the processes would "
            "deadlock; use the same memory_budget and images of one size in all, or more memory",
        )
