"""Promotion of vectors with a value for each position, row or column to maps, where they meet a map.

A vector that was broadcast over the image (`expand`, an upsampled pooling) is broadcast block by block instead. Others
(a position embedding, results of ops on a whole map) are complete: a promoted value is a second name of the tensor, a
source of the stage that reads it tile by tile. A *resident* is smaller than the image along an axis: a value for each
row (N, C, H, 1), or a grid (N, C, 6, 6) that is upsampled. It is complete before the stage, and ops read the part that
their block needs.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...capture.program import Op, Ref
from ...torch_private import tree_map
from ..geometry import Access, repeated, same
from .base import Axes, Block, Env, Flat, Local, Maps, Node, Refusal, VectorOp, arguments


def promoted(
    op: Op, maps: Maps, axes: Axes, rank: int, among: Container[int] | None = None, size: tuple[int, int] | None = None
) -> tuple[Op, list[Node]]:
    """The op with every vector that depends on the position in the image replaced by a map.

    Args:
        axes: the image axes in a broadcast of `rank` dimensions; one axis twice if they are flattened.
        among: the inputs that may be replaced; None for all.
        size: height and width; None if the op reads a map that has them.
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
        flat = None if axes[0] != axes[1] else Flat(*size) if over is None else maps.flat.get(over, Flat(*size))
        for axis, own in zip(axes, size if flat is None else (flat.length,) * 2, strict=True):
            if shape[axis] not in (1, own):
                raise Refusal(f"'{op.name}' combines a map with a tensor of another height or width")
        if over is not None and axes[0] != axes[1] and sorted(shape[axis] == 1 for axis in axes) == [False, True]:
            made, names[value] = spread_strip(op, maps, value, shape, axes, size)
            nodes.extend(made)
            continue
        source = _spread_source(maps, value)
        spreads = source is not None and rank == len(maps.shape(value)) and axes[0] != axes[1]
        if source is not None and over is not None and spreads and all(maps.shape(source)[axis] == 1 for axis in axes):
            number = maps.new_value(like=value)
            maps.axes[number] = axes
            nodes.append(spread(op, maps, source, over, number, axes))
        else:
            number = _promote(maps, value, shape, axes, flat or size)
            nodes.append(VectorOp(_view(value, tuple(shape), axes, flat or size), (value,), (number,)))
        names[value] = number
    if not names:
        return op, nodes
    return renamed(op, names), nodes


def spread(op: Op, maps: Maps, source: int, over: int, output: int, axes: Axes) -> Local:
    """The map `output` with the values of a vector at every position of the map `over`."""
    shape = list(maps.shape(output))

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        full = list(shape)
        height, width = block.rows[1] - block.rows[0], block.cols[1] - block.cols[0]
        full[axes[0]], full[axes[1]] = (height, width) if axes[0] != axes[1] else (height * width,) * 2
        return (env[source].expand(full),)

    own = Op(op.func, "spread", (), {}, (over, source), (output,), (), op.module)
    return Local(own, {over: maps.pointwise(over)}, (axes,), run)


def resident(maps: Maps, value: int, axes: Axes, shape: Sequence[int] | None = None) -> tuple[list[Node], int]:
    """A vector that local ops read by region, like a map; `shape` adds dimensions of size one."""
    shape = list(maps.shape(value) if shape is None else shape)
    number = maps.new_value(shape, like=value)
    maps.axes[number] = axes
    maps.resident.add(number)
    return [VectorOp(lambda env: (env[value].reshape(shape),), (value,), (number,))], number


def over_resident(maps: Maps, value: int, size: tuple[int, int]) -> tuple[Access, Access]:
    """The accesses of an op over a map of this size to a resident, which it repeats along axes of one index."""
    rows, cols = (same(n) if own == n else repeated(n) for own, n in zip(maps.size(value), size, strict=True))
    return rows, cols


def spread_strip(
    op: Op, maps: Maps, value: int, shape: Sequence[int], axes: Axes, size: tuple[int, int], output: int | None = None
) -> tuple[list[Node], int]:
    """A vector with a value for each row or column as a map; `shape` is the vector's shape in the map's rank."""
    nodes, resident_value = resident(maps, value, axes, shape)
    full = list(shape)
    for axis, n in zip(axes, size, strict=True):
        full[axis] = n
    number = maps.new_value(full, like=value) if output is None else output
    maps.axes[number] = axes

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        sizes = list(maps.shape(number))
        sizes[axes[0]], sizes[axes[1]] = block.rows[1] - block.rows[0], block.cols[1] - block.cols[0]
        return (env[resident_value].expand(sizes),)

    own = Op(op.func, "spread", (), {}, (resident_value,), (number,), (), op.module)
    return [*nodes, Local(own, {resident_value: over_resident(maps, resident_value, size)}, (axes,), run)], number


def _spread_source(maps: Maps, value: int) -> int | None:
    """The vector that an op broadcast over the image to make this value; None if no op did."""
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
    """The op with inputs, and the inputs that it writes to, replaced by value number."""

    def swap(leaf: Any) -> Any:
        return Ref(names.get(leaf.value, leaf.value)) if isinstance(leaf, Ref) else leaf

    inputs, mutated = (tuple(names.get(v, v) for v in some) for some in (op.inputs, op.mutated))
    return replace(op, args=tree_map(swap, op.args), kwargs=tree_map(swap, op.kwargs), inputs=inputs, mutated=mutated)


def _promote(maps: Maps, value: int, shape: Sequence[int], axes: Axes, extent: Flat | tuple[int, int]) -> int:
    full = list(shape)
    if isinstance(extent, Flat):
        full[axes[0]] = extent.length
    else:
        full[axes[0]], full[axes[1]] = extent
    number = maps.new_value(full, like=value)
    maps.axes[number] = axes
    if isinstance(extent, Flat):
        maps.flat[number] = extent
    return number


def _view(value: int, shape: tuple[int, ...], axes: Axes, extent: Flat | tuple[int, int]):
    def run(env: Env) -> tuple[Tensor, ...]:
        x = env[value].reshape(shape)
        if isinstance(extent, Flat):  # separates images and windows that a reshape has joined
            return (x.unflatten(axes[0], extent.sizes(extent.height, extent.width)),)
        full = list(shape)
        full[axes[0]], full[axes[1]] = extent
        return (x.expand(full),)

    return run
