"""Smalls that meet a map with a value for each position of it.

One that has been spread over the image before (`expand`, an upsampled pooling) is spread block by block instead. Others
(a position embedding, what ops on a whole map made) are maps that are there: a promoted value is a further name for the
tensor, and as a source of the sweep that reads it, it is read tile by tile.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from ..trace import Op, Ref
from .base import Axes, Block, Env, Flat, Local, Maps, Node, Refusal, Small, arguments


def promoted(
    op: Op, maps: Maps, axes: Axes, rank: int, among: Container[int] | None = None, size: tuple[int, int] | None = None
) -> tuple[Op, list[Node]]:
    """The op with every small that depends on the position in the image replaced by a map.

    Args:
        axes: where the image axes lie in a broadcast of `rank` dimensions; one axis twice if they are flattened.
        among: the inputs that are looked at; None for all.
        size: height and width, where the op reads no map that has them.
    """
    over = next(iter(maps.inputs(op)), None)
    if size is None:
        assert over is not None
        size = maps.size(over)
    nodes: list[Node] = []
    names: dict[int, int] = {}
    for value in op.inputs:
        if value in maps or (among is not None and value not in among):
            continue
        shape = [1] * (rank - len(maps.shape(value))) + list(maps.shape(value))
        if all(shape[axis] == 1 for axis in axes):
            continue
        if over is not None and maps.merged(over):
            raise Refusal(f"'{op.name}' combines a flattened map with a tensor that depends on the position in it")
        for axis, own in zip(axes, size if axes[0] != axes[1] else (size[0] * size[1],) * 2, strict=True):
            if shape[axis] not in (1, own):
                raise Refusal(f"'{op.name}' combines a map with a tensor that has more rows or columns than the map")
        source = _spread_source(maps, value)
        spreads = source is not None and rank == len(maps.shape(value)) and axes[0] != axes[1]
        if source is not None and over is not None and spreads and all(maps.shape(source)[axis] == 1 for axis in axes):
            number = maps.new_value(like=value)
            maps.axes[number] = axes
            nodes.append(spread(op, maps, source, over, number, axes))
        else:
            number = _promote(maps, value, shape, axes, size)
            nodes.append(Small(_view(value, tuple(shape), axes, size), (value,), (number,)))
        names[value] = number
    if not names:
        return op, nodes
    return renamed(op, names), nodes


def spread(op: Op, maps: Maps, source: int, over: int, output: int, axes: Axes) -> Local:
    """The map `output` that has a small's values at every position of the map `over`."""
    shape = list(maps.shape(output))

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        full = list(shape)
        height, width = block.rows[1] - block.rows[0], block.cols[1] - block.cols[0]
        full[axes[0]], full[axes[1]] = (height, width) if axes[0] != axes[1] else (height * width,) * 2
        return (env[source].expand(full),)

    own = Op(op.func, "spread", (), {}, (over, source), (output,), (), op.module)
    return Local(own, {over: maps.pointwise(over)}, (axes,), run)


def _spread_source(maps: Maps, value: int) -> int | None:
    """The small that an op on smalls has spread over the image to make this value, if that is what it has done."""
    maker = next((op for op in maps.program.ops if value in op.outputs), None)
    if maker is None or not maker.inputs or len(maps.shape(maker.inputs[0])) != len(maps.shape(value)):
        return None
    given = arguments(maker, "input size scale_factor mode", mode="nearest")
    if maker.name in ("expand", "expand_as", "broadcast_to"):
        return maker.inputs[0]
    if maker.name in ("interpolate", "upsample") and given["mode"] in ("nearest", "nearest-exact", "bilinear"):
        return maker.inputs[0] if maps.shape(maker.inputs[0])[2:] == (1, 1) else None
    return None


def renamed(op: Op, names: dict[int, int]) -> Op:
    """The op with other inputs."""

    def swap(leaf: Any) -> Any:
        return Ref(names.get(leaf.value, leaf.value)) if isinstance(leaf, Ref) else leaf

    inputs = tuple(names.get(v, v) for v in op.inputs)
    return replace(op, args=tree_map(swap, op.args), kwargs=tree_map(swap, op.kwargs), inputs=inputs)


def _promote(maps: Maps, value: int, shape: Sequence[int], axes: Axes, size: tuple[int, int]) -> int:
    full = list(shape)
    if axes[0] == axes[1]:
        full[axes[0]] = size[0] * size[1]
    else:
        full[axes[0]], full[axes[1]] = size
    number = maps.new_value(full, like=value)
    maps.axes[number] = axes
    if axes[0] == axes[1]:
        maps.flat[number] = Flat(*size)
    return number


def _view(value: int, shape: tuple[int, ...], axes: Axes, size: tuple[int, int]):
    def run(env: Env) -> tuple[Tensor, ...]:
        x = env[value].reshape(shape)
        if axes[0] == axes[1]:
            return (x.unflatten(axes[0], size),)
        full = list(shape)
        full[axes[0]], full[axes[1]] = size
        return (x.expand(full),)

    return run
