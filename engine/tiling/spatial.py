"""One image over several processes: each computes a band of rows of every map, and what is outside is replicated.

Of a stage's *targets* (what it reduces or stores) process r of R owns the rows [H r/R, H (r+1)/R). What those need of
every other map follows by interval arithmetic over the ops, so rows that two bands need are computed twice, and no
process waits for another inside a stage. After it

    sums, maxima, moments   of the bands are gathered, and merged by each process alike
    stored maps             stay as bands; rows that a later stage needs of other bands are fetched, and in the
                            backward their gradient is brought back and added
    gradients of vectors     are summed over the processes

Vectors, and so the outputs and their loss, are the same in all processes: the gradient of what a process has given to a
total is that of the total. In the rewritten network a target is what an op `rows` cuts out of a map, and a stored map
is what an op `placed` reads out of a band: for the stage both are ordinary windows, with negative and positive padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..capture.trace import Op
from ..errors import GigamorphError, UnsupportedError
from ..lowering.geometry import Cells, Window, needed, same
from ..lowering.ops import Env, Local, Reduction, VectorOp
from ..lowering.stages import Stage, StagedProgram
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
        """The rows that a process owns of a target of this height."""
        return height * rank // self.count, height * (rank + 1) // self.count

    def gather(self, x: Tensor) -> Tensor:
        """(*shape) of each process -> (processes, *shape)."""
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
        """Whether something holds in all processes."""
        return bool(self.gather(torch.tensor([true], device=device)).all())

    @contextlib.contextmanager
    def same_random_numbers(self, device: torch.device) -> Iterator[None]:
        """The random numbers of the first process in all: they draw the same masks for what they compute alike.

        Those of the first process go on as they would if it were alone; those of the others stay where they are.
        """
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus, enabled=self.rank > 0):
            torch.set_rng_state(self.gather(torch.get_rng_state().to(device))[0].cpu())
            for gpu in gpus:
                torch.cuda.set_rng_state(self.gather(torch.cuda.get_rng_state(gpu).to(gpu))[0].cpu(), gpu)
            yield


class Gathered(torch.autograd.Function):
    """What all processes have, in each of them; all go on alike, so each takes back the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SpatialShard):
        ctx.rank = shard.rank
        return shard.gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return grads[0][ctx.rank], None


class Maximum(torch.autograd.Function):
    """The largest of what the processes have; its gradient goes to where stock PyTorch's goes.

    That is all equal elements in equal parts, of which each process gives the number, or the first (the last NaN).
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
    """Rows of a map that processes own, and those that they need; each by process.

    `alike` says that all processes compute the same with what they get (they need the whole map).
    """

    shard: SpatialShard
    axis: int
    own: tuple[Rows, ...]
    need: tuple[Rows, ...]
    alike: bool = False

    def fetch(self, x: Tensor) -> Tensor:
        """The rows that this process needs, of `x`, those that it owns."""
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
        """The gradient of the rows that this process owns, of `grad`, that of the rows it needed."""
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
        """Send a part to each process that has one of its own, and get one from each that wants one."""
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
    """`Exchange.fetch`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange):
        ctx.exchange = exchange
        return exchange.fetch(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return ctx.exchange.bring_back(grads[0]), None


def split_network(staged: StagedProgram, shard: SpatialShard) -> StagedProgram:
    """The network that computes this process's bands.

    Raises:
        UnsupportedError: for random numbers drawn position by position.
    """
    return _Splitter(staged, shard).run()


class _Splitter:
    def __init__(self, staged: StagedProgram, shard: SpatialShard):
        self.staged, self.shard, self.maps = staged, shard, staged.maps
        self.stored = {v for stage in staged.stages for v in stage.stored}
        self.needs: dict[int, list[Rows]] = {}  # stored map -> rows that each process needs in later stages
        self.whole: set[int] = set(staged.program.results()) & self.stored  # those needed whole
        for step in staged.steps:
            if isinstance(step, Op):
                self.whole |= self.stored & set(step.inputs)
            elif isinstance(step, Stage):
                self._add_needs(step)
        self.fetched: dict[int, tuple[int, int]] = {}  # stored map -> what is fetched of it, and its first row

    def _add_needs(self, stage: Stage) -> None:
        for local in stage.locals:
            if local.random:
                raise UnsupportedError(
                    f"{local.op} draws random numbers position by position; an image cannot be split over processes "
                    "there; put that module in evaluation mode"
                )
        reads = [(local.op.outputs, [(v, a[0]) for v, a in local.reads.items()]) for local in stage.locals]
        for rank in range(self.shard.count):
            targets = {v: self.shard.rows(self.maps.size(v)[0], rank) for v in _targets(stage)}
            need = needed(targets, reads)
            for v in set(stage.sources) & self.stored:
                rows = self.needs.setdefault(v, [(0, 0)] * self.shard.count)
                rows[rank] = _hull(rows[rank], need.get(v, (0, 0)))

    def run(self) -> StagedProgram:
        steps: list[Any] = []
        begins: list[int] = []
        for step in self.staged.steps:
            begins.append(len(steps))
            steps.extend(self._graph(step) if isinstance(step, Stage) else [step])
        begins.append(len(steps))
        segments = [range(begins[part.start], begins[part.stop]) for part in self.staged.segments]
        return replace(self.staged, steps=steps, segments=segments)

    def _map(self, value: int, height: int) -> int:
        """A further map like another, of another height."""
        axes, shape = self.maps.axes[value], list(self.maps.shape(value))
        shape[axes[0]] = height
        made = self.maps.new_value(shape, like=value)
        self.maps.axes[made] = axes
        return made

    def _window(self, source: int, target: int, pad: int, name: str) -> Local:
        """The op that reads rows of a map; `pad` is positive where the source is the smaller one."""
        maps = self.maps
        height, width = maps.size(source)
        access = Window(height, maps.size(target)[0], pad=pad)
        op = Op(Tensor.narrow, name, (), {}, (source,), (target,), (), "")

        def run(env: Env, _block: Any) -> tuple[Tensor, ...]:
            return (env[source],)

        return Local(op, {source: (access, same(width))}, (maps.axes[target],), run)

    def _graph(self, stage: Stage) -> list[Stage | VectorOp]:
        maps, shard = self.maps, self.shard
        before: list[Local] = []
        behind: list[Local] = []
        sources: list[int] = []
        offsets: dict[int, Rows] = {}
        for v in stage.sources:
            if v in self.fetched:
                fetched, first = self.fetched[v]
                before.append(self._window(fetched, v, first, "placed"))
                sources.append(fetched)
                offsets[fetched] = first, maps.size(v)[0]
            else:
                sources.append(v)
        own: dict[int, int] = {}
        for v in _targets(stage):
            top, bottom = shard.rows(maps.size(v)[0], shard.rank)
            own[v] = self._map(v, bottom - top)
            behind.append(self._window(v, own[v], -top, "rows"))
        merges: list[VectorOp] = []
        reductions = [self._reduction(r, own[r.value], merges) for r in stage.reductions]
        for v in stage.stored:
            merges.extend(self._fetches(v, own[v]))
        made = replace(
            stage,
            sources=sorted(sources),
            locals=[*before, *stage.locals, *behind],
            reductions=reductions,
            stored=[own[v] for v in stage.stored],
            prelude=list(stage.prelude),
            offsets=offsets,
        )
        return [made, *merges]

    def _fetches(self, value: int, own: int) -> list[VectorOp]:
        """What gets rows of a stored map from where they are."""
        height, axis = self.maps.size(value)[0], self.maps.axes[value][0]
        owned = tuple(self.shard.rows(height, r) for r in range(self.shard.count))
        result = []
        if value in self.needs:
            exchange = Exchange(self.shard, axis, owned, tuple(self.needs[value]))
            first, end = exchange.need[self.shard.rank]
            made = self._map(value, end - first)
            self.fetched[value] = made, first
            result.append(_fetch(own, made, exchange))
        if value in self.whole:
            whole = Exchange(self.shard, axis, owned, ((0, height),) * self.shard.count, alike=True)
            result.append(_fetch(own, value, whole))
        return result

    def _reduction(self, reduction: Reduction, own: int, merges: list[VectorOp]) -> Reduction:
        """The reduction of a band; what merges it with those of the others is added to `merges`."""
        maps, shard = self.maps, self.shard
        values = maps.program.values
        height, width = maps.size(reduction.value)
        dtypes = [values[v].dtype for v in reduction.outputs]
        top = shard.rows(height, shard.rank)[0]
        if reduction.grid is not None:
            rows, cols = reduction.grid
            reduction = replace(reduction, grid=(replace(rows, first=top), cols))
        wide = torch.float32 if values[own].device.type == "mps" else torch.float64
        if reduction.kind == "moments":
            partial = tuple(maps.new_value(like=v) for v in reduction.outputs)
            parts = [shard.rows(height, r) for r in range(shard.count)]
            pixels = [width * (b - a) for a, b in parts]
            grid, axis, rank = reduction.grid, maps.axes[own][0], len(maps.shape(own))
            each = None if grid is None else _shares_of_cells(grid, axis, rank, parts)

            def moments(env: Env) -> tuple[Tensor, ...]:
                mean, var = Gathered.apply(torch.stack([env[v].to(wide) for v in partial]), shard).unbind(1)  # pyright: ignore
                if each is None:
                    shares = mean.new_tensor(pixels).div_(sum(pixels)).view(-1, *[1] * (mean.dim() - 1))
                else:
                    shares = each.to(mean)
                    mean, var = (torch.where(shares == 0, 0, t) for t in (mean, var))
                total = (shares * mean).sum(0)
                return total.to(dtypes[0]), (shares * (var + (mean - total).square())).sum(0).to(dtypes[1])

            merges.append(VectorOp(moments, partial, reduction.outputs))
            count = max(1, pixels[shard.rank]) * reduction.per_pixel
            if grid is not None:
                count = max(1, reduction.count if grid[0].every else parts[shard.rank][1] - top)
            return replace(reduction, value=own, count=count, outputs=partial)
        (output,) = reduction.outputs
        if reduction.kind == "sum":
            part = maps.new_value(dtype=wide, like=output)

            def total(env: Env) -> tuple[Tensor, ...]:
                return (Gathered.apply(env[part], shard).sum(0).to(dtypes[0]),)  # pyright: ignore

            merges.append(VectorOp(total, (part,), (output,)))
            return replace(reduction, value=own, outputs=(part,))
        part, number = maps.new_value(like=output), maps.new_value(dtype=wide, like=output)

        def largest(env: Env) -> tuple[Tensor, ...]:
            return (Maximum.apply(env[part], env[number].detach(), reduction, shard),)  # pyright: ignore

        merges.append(VectorOp(largest, (part, number), (output,)))
        return replace(reduction, value=own, outputs=(part, number))


def _shares_of_cells(grid: tuple[Cells, Cells], axis: int, rank: int, parts: Sequence[Rows]) -> Tensor:
    """What part each process has of the pixels of each row, or of each column: (processes, *like the result)."""
    rows = grid[0]
    if not rows.every:
        return torch.tensor([(b - a) / rows.size for a, b in parts], dtype=torch.float64).view(-1, *[1] * rank)
    own = torch.tensor([[top <= row < bottom for row in range(rows.size)] for top, bottom in parts])
    return own.view(len(parts), *(rows.size if d == axis else 1 for d in range(rank)))


def _fetch(source: int, target: int, exchange: Exchange) -> VectorOp:
    return VectorOp(lambda env: (Fetch.apply(env[source], exchange),), (source,), (target,))  # pyright: ignore


def _targets(stage: Stage) -> list[int]:
    """What a stage reduces or stores."""
    return list(dict.fromkeys([*(r.value for r in stage.reductions), *stage.stored]))


def _hull(a: Rows, b: Rows) -> Rows:
    if a[0] >= a[1] or b[0] >= b[1]:
        return b if a[0] >= a[1] else a
    return min(a[0], b[0]), max(a[1], b[1])


def spatial_group(split: Any) -> SpatialShard:
    """The processes for `accelerate`'s argument: all of them, or those of a group.

    Raises:
        GigamorphError: without a process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise GigamorphError("an image is split over processes: call torch.distributed.init_process_group before")
    return SpatialShard(dist.group.WORLD if split is True else split)  # pyright: ignore[reportArgumentType]
