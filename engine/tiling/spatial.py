"""Communication of processes that share an image: sums, maxima, rows of stored maps, and their gradients.

Each process computes a band of rows of every map, see `spatial_program`. Vectors, and therefore the outputs and the
loss, are equal in all processes. So the gradient of a process's summand is the gradient of the sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import GigamorphError
from ..lowering.ops import Reduction
from .stored_maps import new_map

Rows = tuple[int, int]


@dataclass(frozen=True)
class SpatialShard:
    """The processes that share an image."""

    group: dist.ProcessGroup

    @cached_property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    @cached_property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def rows(self, height: int, rank: int) -> Rows:
        """The rows [top, bottom) that a process owns of a target of this height."""
        return height * rank // self.count, height * (rank + 1) // self.count

    def gather(self, x: Tensor) -> Tensor:
        """Gather a tensor (*shape) from each process into (processes, *shape)."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes."""
        result: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            mine = [n for n, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[n].reshape(-1) for n in mine])
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensors[n].numel() for n in mine])
            result.update((n, part.view(tensors[n].shape)) for n, part in zip(mine, parts, strict=True))
        return [result[n] for n in range(len(tensors))]

    def all_agree(self, true: bool, device: torch.device) -> bool:
        """Whether `true` is true in all processes."""
        return bool(self.gather(torch.tensor([true], device=device)).all())

    @contextlib.contextmanager
    def same_random_numbers(self, device: torch.device) -> Iterator[None]:
        """Context in which all processes draw the random numbers of the first, for masks of replicated computations.

        The generator of the first process advances as in a single process; those of the others are restored.
        """
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus, enabled=self.rank > 0):
            torch.set_rng_state(self.gather(torch.get_rng_state().to(device))[0].cpu())
            for gpu in gpus:
                torch.cuda.set_rng_state(self.gather(torch.cuda.get_rng_state(gpu).to(gpu))[0].cpu(), gpu)
            yield


class GatheredFunction(torch.autograd.Function):
    """Gathers the tensors of all processes in each process.

    All processes continue equally, so each takes the gradient of its own tensor without communication.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SpatialShard):
        ctx.rank = shard.rank
        return shard.gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return grads[0][ctx.rank], None


class Maximum(torch.autograd.Function):
    """The maximum over the processes; its gradient goes to the same elements as in stock PyTorch.

    All equal elements share it equally (`number` counts them per process), or the first one gets it (the last NaN).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: Tensor, reduction: Reduction, shard: SpatialShard):
        values, numbers = shard.gather(x), shard.gather(number)
        total = values.amax(0)
        tops = torch.where(reduction.has(values, total), numbers, 0)
        if reduction.first_only:
            there = tops > 0
            last = there & (there.flip(0).cumsum(0).flip(0) == 1)
            tops = torch.where(total.isnan(), last, there & (there.cumsum(0) == 1))
        ctx.save_for_backward((tops / tops.sum(0))[shard.rank])
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (share,) = ctx.saved_tensors
        return (grads[0] * share).to(grads[0].dtype), None, None, None


@dataclass(frozen=True)
class Exchange:
    """An exchange of rows of a map between processes.

    Attributes:
        shard: the processes.
        axis: the dimension of the rows.
        own: the rows that each process owns.
        need: the rows that each process needs.
        alike: whether all processes need the whole map and compute the same from it.
    """

    shard: SpatialShard
    axis: int
    own: tuple[Rows, ...]
    need: tuple[Rows, ...]
    alike: bool = False

    def fetch(self, x: Tensor) -> Tensor:
        """Exchange `x`, the rows that this process owns, for the rows that it needs."""
        me = self.shard.rank
        shape = list(x.shape)
        shape[self.axis] = self.need[me][1] - self.need[me][0]
        result = new_map(x, shape)
        sent = {r: self._part(x, self.own[me], _overlap(self.own[me], need)) for r, need in enumerate(self.need)}
        wanted = {r: self._part(result, self.need[me], _overlap(own, self.need[me])) for r, own in enumerate(self.own)}
        got = self._trade(sent, {r: torch.empty_like(t) for r, t in wanted.items()})
        for r, part in wanted.items():
            part.copy_(got[r])
        return result

    def bring_back(self, grad: Tensor) -> Tensor:
        """Exchange `grad`, the gradient of the needed rows, for the gradient of the rows that this process owns."""
        me = self.shard.rank
        shape = list(grad.shape)
        shape[self.axis] = self.own[me][1] - self.own[me][0]
        result = new_map(grad, shape, zero=True)
        if self.alike:
            return result.copy_(self._part(grad, self.need[me], self.own[me]))
        sent = {r: self._part(grad, self.need[me], _overlap(own, self.need[me])) for r, own in enumerate(self.own)}
        wanted = {r: self._part(result, self.own[me], _overlap(self.own[me], need)) for r, need in enumerate(self.need)}
        got = self._trade(sent, {r: torch.empty_like(t) for r, t in wanted.items()})
        for r, part in wanted.items():
            part.add_(got[r])
        return result

    def _part(self, x: Tensor, rows: Rows, part: Rows) -> Tensor:
        return x.narrow(self.axis, part[0] - rows[0] if part[0] < part[1] else 0, part[1] - part[0])

    def _trade(self, sent: dict[int, Tensor], got: dict[int, Tensor]) -> dict[int, Tensor]:
        """Send each process its part and receive this process's parts, both by rank; empty parts are skipped."""
        me, group = self.shard.rank, self.shard.group
        got = {r: t.contiguous() for r, t in got.items()}
        got[me] = sent[me]
        calls = []
        for r in range(self.shard.count):
            peer = dist.get_global_rank(group, r)
            if r != me and sent[r].numel():
                calls.append(dist.P2POp(dist.isend, sent[r].contiguous(), peer, group))
            if r != me and got[r].numel():
                calls.append(dist.P2POp(dist.irecv, got[r], peer, group))
        for work in dist.batch_isend_irecv(calls) if calls else ():
            work.wait()
        return got


def _overlap(a: Rows, b: Rows) -> Rows:
    top = max(a[0], b[0])
    return top, max(top, min(a[1], b[1]))


class Fetch(torch.autograd.Function):
    """`Exchange.fetch` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange):
        ctx.exchange = exchange
        return exchange.fetch(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return ctx.exchange.bring_back(grads[0]), None


def spatial_group(split: Any) -> SpatialShard:
    """The shard for `accelerate`'s argument: all processes (True), or those of a group.

    Raises:
        GigamorphError: if no process group is initialized.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise GigamorphError("cannot split an image over processes: call torch.distributed.init_process_group first")
    return SpatialShard(dist.group.WORLD if split is True else split)  # pyright: ignore[reportArgumentType]
