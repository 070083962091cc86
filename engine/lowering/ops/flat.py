"""Maps whose image axes a reshape has flattened into one: tokens (N, H*W, C), heads (N, heads, c, H*W), (N*H*W, C).

For rules, a flattened map has one image axis, listed twice in `Maps.axes`, and the shape of the recorded call. The scan
does not see flattened maps: `unflatten` gives them both axes again and flattens the blocks that each op reads. The
pixels of a block are then in another order than in the whole map, which changes no per-pixel op and no sum.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...capture.program import Op, Ref
from .base import Block, Env, Flat, Local, Maps, Node, Reduction, Run, VectorOp, Whole
from .promote import renamed


def unflatten(maps: Maps, nodes: Sequence[Node | Op]) -> list[Node | Op]:
    """The nodes with both image axes restored in flattened maps."""
    if not maps.flat:
        return list(nodes)
    flat_axes = {value: _FlatAxis(maps.axes[value][0], flat) for value, flat in maps.flat.items()}
    result: list[Node | Op] = []
    for node in nodes:
        if isinstance(node, Local):
            result.append(_local(node, flat_axes))
        elif isinstance(node, Reduction) and node.value in flat_axes:
            result.extend(_reduction(maps, node, flat_axes[node.value]))
        elif isinstance(node, Whole) and not flat_axes.keys().isdisjoint(node.op.inputs):
            names = {v: _flattened(maps, v, flat_axes[v], result) for v in node.op.inputs if v in flat_axes}
            result.append(Whole(renamed(node.op, names)))
        else:
            result.append(node)
    for value in dict.fromkeys(maps.program.results()):
        if value in flat_axes:
            maps.program.stands_in[value] = _flattened(maps, value, flat_axes[value], result)
    for value, where in flat_axes.items():
        info = maps.program.values[value]
        sizes = where.flat.sizes(where.flat.height, where.flat.width)
        info.shape = torch.Size([*info.shape[: where.axis], *sizes, *info.shape[where.axis + 1 :]])
        maps.axes[value] = where.axes
    maps.flat.clear()
    return result


@dataclass(frozen=True)
class _FlatAxis:
    """The flattened dimension of a map, and the dimensions that it is made of."""

    axis: int
    flat: Flat

    @property
    def count(self) -> int:
        return 4 if self.flat.merged else 2

    @property
    def axes(self) -> tuple[int, int]:
        height = self.axis + self.flat.merged
        return height, height + 1

    def flatten(self, x: Tensor) -> Tensor:
        return x.flatten(self.axis, self.axis + self.count - 1)


def _local(local: Local, flat_axes: dict[int, _FlatAxis]) -> Local:
    """A local op that flattens the blocks it reads and restores both axes of its results."""
    inputs = {v: flat_axes[v] for v in local.reads if v in flat_axes}
    outputs = [flat_axes.get(v) for v in local.op.outputs]
    if not inputs and all(where is None for where in outputs):
        return local
    plain: Run = local.run

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        flattened = {v: where.flatten(env[v]) for v, where in inputs.items()}
        size = block.size
        made = plain(ChainMap(flattened, env), block)  # pyright: ignore[reportArgumentType]
        both = zip(made, outputs, strict=True)
        return tuple(t if where is None else t.unflatten(where.axis, where.flat.sizes(*size)) for t, where in both)

    # Rewrites match ops by name and must not mistake it for an op on both axes.
    return replace(local, op=replace(local.op, name=f"flat_{local.op.name}"), run=run)


def _reduction(maps: Maps, reduction: Reduction, where: _FlatAxis) -> list[Node]:
    """A reduction over all dimensions of the flattened axis, and a vector op that restores the recorded shape."""
    if reduction.form is not None:
        return [reduction]
    axis, more = where.axis, where.count - 1
    own = tuple(range(axis, axis + where.count))
    dims = tuple(d for r in reduction.dims for d in (own if r == axis else (r + more * (r > axis),)))
    if not reduction.keepdim:
        return [replace(reduction, dims=dims)]
    values = maps.program.values
    made_values = []
    for value in reduction.outputs:
        shape = values[value].shape
        made_values.append(maps.new_value((*shape[: axis + 1], *(1,) * more, *shape[axis + 1 :]), like=value))
    made = tuple(made_values)
    drop = VectorOp(lambda env: tuple(env[v].squeeze(own[1:]) for v in made), made, reduction.outputs)
    return [replace(reduction, dims=dims, outputs=made), drop]


def _flattened(maps: Maps, value: int, where: _FlatAxis, nodes: list[Node | Op]) -> int:
    """A vector that is the whole map flattened; the op that makes it is appended to the nodes."""
    made = maps.new_value(list(maps.shape(value)), like=value)
    args = (Ref(value), where.axis, where.axis + where.count - 1)
    nodes.append(Whole(Op(torch.flatten, "flatten", args, {}, (value,), (made,), (), "")))
    return made
