"""Promotion of vectors with a value for each position, row or column to maps, where they meet a map.

A vector that was broadcast over the image (`expand`, an upsampled pooling) is broadcast block by block instead. Others
(a position embedding, results of ops on a whole map) are complete: a promoted value is a second name of the tensor, a
source of the stage that reads it tile by tile. A *resident* is smaller than the image along an axis: a value for each
row (N, C, H, 1), or a grid (N, C, 6, 6) that is upsampled. It is complete before the stage, and ops read the part that
their block needs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...capture.program import Op, Ref
from ...torch_private import tree_map
from ..geometry import Access, repeated, same
from .base import Axes, Block, Env, Flat, Local, Maps, Node, Refusal, VectorOp, arguments, nodes_of, part_of
from .names import ELEMENTWISE

Reads = Mapping[int, tuple[Access, Access]]


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
            number = maps.new_map(axes, like=value)
            nodes.append(spread(op, maps, source, {over: maps.pointwise(over)}, number, axes))
        else:
            full = list(shape)
            for axis, own in zip(axes, size if flat is None else (flat.length,) * 2, strict=True):
                full[axis] = own
            number = maps.new_map(axes, full, like=value, flat=flat)
            nodes.append(vector((value,), number, partial(_viewed, shape, full, axes, flat)))
        names[value] = number
    if not names:
        return op, nodes
    return renamed(op, names), nodes


def spread(op: Op, maps: Maps, source: int, reads: Reads, output: int, axes: Axes) -> Local:
    """The map `output` with the values of `source` at every position of the maps that are read."""
    shape = list(maps.shape(output))

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        full, (height, width) = list(shape), block.size
        full[axes[0]], full[axes[1]] = (height, width) if axes[0] != axes[1] else (height * width,) * 2
        return (env[source].expand(full),)

    return Local(part_of(op, "spread", (*reads, source), (output,)), reads, (axes,), run)


def resident(maps: Maps, value: int, axes: Axes, shape: Sequence[int] | None = None) -> tuple[list[Node], int]:
    """A vector that local ops read by region, like a map; `shape` adds dimensions of size one."""
    shape = list(maps.shape(value) if shape is None else shape)
    number = maps.new_map(axes, shape, like=value)
    maps.resident.add(number)
    return [vector((value,), number, lambda x: x.reshape(shape))], number


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
    reads = {resident_value: over_resident(maps, resident_value, size)}
    return [*nodes, spread(op, maps, resident_value, reads, number, axes)], number


def mapped(
    op: Op,
    maps: Maps,
    name: str,
    values: tuple[int, ...],
    function: Callable[..., Tensor],
    dtype: torch.dtype | None = None,
    vectors: tuple[int, ...] = (),
    output: int | None = None,
) -> tuple[Local, int]:
    """A per-pixel local op, `function(*values, *vectors)`; all values have the axes of the first."""
    made = maps.new_value(dtype=dtype, like=values[0]) if output is None else output
    maps.axes[made] = maps.axes[values[0]]
    if values[0] in maps.flat:
        maps.flat[made] = maps.flat[values[0]]

    def run(env: Env, _block: Any) -> tuple[Tensor, ...]:
        return (function(*(env[v] for v in (*values, *vectors))),)

    reads = {v: maps.pointwise(v) for v in values}
    reads.update({v: over_resident(maps, v, maps.size(made)) for v in vectors if v in maps.resident})
    return Local(part_of(op, name, (*values, *vectors), (made,)), reads, (maps.axes[made],), run), made


def vector(inputs: tuple[int, ...], output: int, function: Callable[..., Tensor]) -> VectorOp:
    """A vector op: `function(*inputs)`."""
    return VectorOp(lambda env: (function(*(env[v] for v in inputs)),), inputs, (output,))


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


def _viewed(shape: Sequence[int], full: Sequence[int], axes: Axes, flat: Flat | None, x: Tensor) -> Tensor:
    """A complete vector as a map."""
    if flat is None:
        return x.reshape(shape).expand(full)
    # Separates images and windows that a reshape has joined.
    return x.reshape(shape).unflatten(axes[0], flat.sizes(flat.height, flat.width))


# -- ops on vectors ----------------------------------------------------------------------------------------------------

_RESAMPLES = frozenset({"interpolate", "upsample", "upsample_nearest", "upsample_bilinear"})
_SPREADS = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "tile"})
_PRODUCTS = frozenset({"matmul", "__matmul__"})


def rise(op: Op, maps: Maps) -> list[Node] | None:
    """The nodes of an op on vectors with a value for each image position in its result: a map, made block by block.

        interpolate   (N, C, 6, 6) -> (N, C, H, W)                 pyramid pooling
        expand        (N, C, H, 1) -> (N, C, H, W)                 strip pooling
        a + b, a @ b  (N, C, H, 1), (N, C, 1, W) -> (N, C, H, W)   coordinate attention

    Its inputs are resident. Returns None for others, whose result is computed whole and stays a vector.
    """
    if len(op.outputs) != 1 or op.mutated or op.autocast is not None:
        return None
    output = op.outputs[0]
    shape = tuple(maps.shape(output))
    if len(shape) != 4 or 1 in shape[2:] or shape[2:] not in {maps.size(v) for v in maps.axes}:
        return None
    inputs = {v: tuple(maps.shape(v)) for v in op.inputs}
    if any(len(given) > 4 or given[-2:] == shape[2:] for given in inputs.values()):
        return None
    if all(given[-2:] in ((), (1,), (1, 1)) for given in inputs.values()):
        return None  # `promoted` spreads one value for all positions where it meets a map
    try:
        if op.name in _RESAMPLES:
            return _resampled(op, maps)
        if op.name in _SPREADS:
            return _repeated(op, maps)
        if op.name in _PRODUCTS:
            return _product(op, maps)
        return _broadcast(op, maps) if op.name in ELEMENTWISE else None
    except Refusal:
        return None


def _resampled(op: Op, maps: Maps) -> list[Node] | None:
    value = op.inputs[0]
    if len(maps.shape(value)) != 4:
        return None
    nodes, resident_value = resident(maps, value, (2, 3))
    made = nodes_of(renamed(op, {value: resident_value}), maps)
    return [*nodes, *made] if isinstance(made[0], Local) else None


def _repeated(op: Op, maps: Maps) -> list[Node] | None:
    value, output = op.inputs[0], op.outputs[0]
    own, full = tuple(maps.shape(value)), tuple(maps.shape(output))
    own = (1,) * (4 - len(own)) + own
    target = (*own[:2], *full[2:]) if op.name in ("repeat", "tile") else full
    if target != full or any(size not in (1, whole) for size, whole in zip(own, full, strict=True)):
        return None
    nodes, _ = spread_strip(op, maps, value, own, (2, 3), (full[2], full[3]), output)
    return nodes


def _broadcast(op: Op, maps: Maps) -> list[Node] | None:
    size = maps.shape(op.outputs[0])[-2], maps.shape(op.outputs[0])[-1]
    nodes: list[Node] = []
    names: dict[int, int] = {}
    for value in dict.fromkeys(op.inputs):
        shape = [1] * (4 - len(maps.shape(value))) + list(maps.shape(value))
        if shape[2:] != [1, 1]:
            made, names[value] = spread_strip(op, maps, value, shape, (2, 3), size)
            nodes.extend(made)
    return [*nodes, *nodes_of(renamed(op, names), maps)]


def _product(op: Op, maps: Maps) -> list[Node] | None:
    """An outer product, (N, C, H, 1) @ (N, C, 1, W)."""
    left, right = op.inputs if len(op.inputs) == 2 else (op.inputs[0],) * 2
    if maps.shape(left)[-1] != 1 or len(maps.shape(left)) != 4 or len(maps.shape(right)) != 4:
        return None
    output = op.outputs[0]
    size = maps.shape(output)[2], maps.shape(output)[3]
    nodes, rows = resident(maps, left, (2, 3))
    more, cols = resident(maps, right, (2, 3))

    def run(env: Env, _block: object) -> tuple[Tensor, ...]:
        return (env[rows] * env[cols],)

    reads = {v: over_resident(maps, v, size) for v in (rows, cols)}
    return [*nodes, *more, Local(part_of(op, "outer_product", reads, (output,)), reads, ((2, 3),), run)]
