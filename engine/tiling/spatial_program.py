"""Splits a network over processes that share an image: each process computes a band of rows of every map.

Process r of R owns the rows [H r/R, H (r+1)/R) of a stage's *targets* (the maps that it reduces or stores). Interval
arithmetic over the ops gives the rows of all other maps that these need. Rows that two bands need are computed twice,
so no process waits for another inside a stage. After the stage:

    sums, maxima, moments   of the bands are gathered, and every process merges them
    stored maps             remain split into bands; rows that a later stage needs of other bands are fetched, and the
                            backward returns and adds their gradients
    gradients of vectors    are summed over the processes

Computations outside the stages are replicated. In the rewritten network an op `rows` cuts a target out of a map, and an
op `placed` reads a stored map from a band. For the stage both are ordinary windows, with negative and positive padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..capture.program import Op
from ..errors import UnsupportedError
from ..lowering.geometry import Cells, Window, needed, same
from ..lowering.ops import Env, Local, Reduction, VectorOp
from ..lowering.stages import ProgramStage, StagedProgram
from .spatial import Exchange, Fetch, GatheredFunction, Maximum, Rows, SpatialShard


def split_network(staged: StagedProgram, shard: SpatialShard) -> StagedProgram:
    """The network that computes the bands of this process.

    Raises:
        UnsupportedError: if an op draws random numbers per position, or a hook is registered on a map.
    """
    return _Splitter(staged, shard).run()


class _Splitter:
    def __init__(self, staged: StagedProgram, shard: SpatialShard):
        self.staged, self.shard, self.maps = staged, shard, staged.maps
        self.stored = {v for stage in staged.stages for v in stage.stored}
        self.needs: dict[int, list[Rows]] = {}  # stored map -> rows that each process needs in later stages
        self.whole: set[int] = set(staged.program.results()) & self.stored  # maps needed as a whole
        if any(op.name == "tensor_hook" and op.outputs[0] in staged.maps for op in staged.program.ops):
            raise UnsupportedError(
                "cannot split the image over processes: a backward hook on a map would get the gradient of one band "
                "only; remove the hook or do not split the image"
            )
        for step in staged.steps:
            if isinstance(step, Op):
                self.whole |= self.stored & set(step.inputs)
            elif isinstance(step, ProgramStage):
                self._add_needs(step)
        self.fetched: dict[int, tuple[int, int]] = {}  # stored map -> (fetched map, first row)

    def _add_needs(self, stage: ProgramStage) -> None:
        for local in stage.locals:
            if local.random:
                raise UnsupportedError(
                    f"cannot split the image over processes: {local.op} draws random numbers per position; "
                    "put that module in evaluation mode"
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
            steps.extend(self._graph(step) if isinstance(step, ProgramStage) else [step])
        begins.append(len(steps))
        segments = [range(begins[part.start], begins[part.stop]) for part in self.staged.segments]
        return replace(self.staged, steps=steps, segments=segments)

    def _map(self, value: int, height: int) -> int:
        """A new map like another, with another height."""
        axes, shape = self.maps.axes[value], list(self.maps.shape(value))
        shape[axes[0]] = height
        made = self.maps.new_value(shape, like=value)
        self.maps.axes[made] = axes
        return made

    def _window(self, source: int, target: int, pad: int, name: str) -> Local:
        """The op that reads rows of a map; `pad` is positive if the source is smaller than the target."""
        maps = self.maps
        height, width = maps.size(source)
        access = Window(height, maps.size(target)[0], pad=pad)
        op = Op(Tensor.narrow, name, (), {}, (source,), (target,), (), "")

        def run(env: Env, _block: Any) -> tuple[Tensor, ...]:
            return (env[source],)

        return Local(op, {source: (access, same(width))}, (maps.axes[target],), run)

    def _graph(self, stage: ProgramStage) -> list[ProgramStage | VectorOp]:
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
        """The ops that fetch rows of a stored map from the processes that own them."""
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
        """The reduction of a band; appends the op that merges the bands to `merges`."""
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
                mean, var = GatheredFunction.apply(torch.stack([env[v].to(wide) for v in partial]), shard).unbind(1)  # pyright: ignore
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
                return (GatheredFunction.apply(env[part], shard).sum(0).to(dtypes[0]),)  # pyright: ignore

            merges.append(VectorOp(total, (part,), (output,)))
            return replace(reduction, value=own, outputs=(part,))
        part, number = maps.new_value(like=output), maps.new_value(dtype=wide, like=output)

        def largest(env: Env) -> tuple[Tensor, ...]:
            return (Maximum.apply(env[part], env[number].detach(), reduction, shard),)  # pyright: ignore

        merges.append(VectorOp(largest, (part, number), (output,)))
        return replace(reduction, value=own, outputs=(part, number))


def _shares_of_cells(grid: tuple[Cells, Cells], axis: int, rank: int, parts: Sequence[Rows]) -> Tensor:
    """Each process's share of the pixels of each row or column: (processes, *shape of the result)."""
    rows = grid[0]
    if not rows.every:
        return torch.tensor([(b - a) / rows.size for a, b in parts], dtype=torch.float64).view(-1, *[1] * rank)
    own = torch.tensor([[top <= row < bottom for row in range(rows.size)] for top, bottom in parts])
    return own.view(len(parts), *(rows.size if d == axis else 1 for d in range(rank)))


def _fetch(source: int, target: int, exchange: Exchange) -> VectorOp:
    return VectorOp(lambda env: (Fetch.apply(env[source], exchange),), (source,), (target,))  # pyright: ignore


def _targets(stage: ProgramStage) -> list[int]:
    """The maps that a stage reduces or stores."""
    return list(dict.fromkeys([*(r.value for r in stage.reductions), *stage.stored]))


def _hull(a: Rows, b: Rows) -> Rows:
    if a[0] >= a[1] or b[0] >= b[1]:
        return b if a[0] >= a[1] else a
    return min(a[0], b[0]), max(a[1], b[1])
