"""Rules of indexing: slices, integers and lists of channels per pixel; a slice of an image axis is a window (a crop).

PyTorch itself determines the dimensions of a result: the rule indexes a meta tensor whose sizes are all different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...capture.program import Op, Ref, bind, refs
from ...torch_private import tree_leaves
from ..geometry import Access, Gather, Window
from .base import Block, Env, Local, Maps, Node, Refusal, VectorOp, Whole, arguments, replay, rule
from .padding import joined_mirror
from .promote import promoted


def spelt_out(key: Any, rank: int) -> tuple[Any, ...]:
    """The index with one item for each dimension, and None for each new dimension."""
    items = key if isinstance(key, tuple) else (key,)
    if any(isinstance(leaf, (bool, Tensor)) for leaf in tree_leaves(items)):
        raise Refusal("cannot index with a mask; use channel numbers")
    used = sum(item is not None and item is not Ellipsis for item in items)
    if not any(item is Ellipsis for item in items):
        items = (*items, Ellipsis)
    spot = next(i for i, item in enumerate(items) if item is Ellipsis)
    return (*items[:spot], *[slice(None)] * (rank - used), *items[spot + 1 :])


def origins(maps: Maps, key: Sequence[Any]) -> list[int | None]:
    """For each dimension of an indexed tensor, its dimension before indexing, or None for a new one."""

    def stand_in(item: Any) -> Any:
        if item is None or isinstance(item, (slice, int)):
            return slice(None) if isinstance(item, slice) else None if item is None else 0
        if isinstance(item, Ref) and maps.program.values[item.value].dtype == torch.bool:
            raise Refusal("cannot index with a mask; use channel numbers")
        rank = len(maps.shape(item.value)) if isinstance(item, Ref) else torch.tensor(item).dim()
        return torch.zeros([1] * rank, dtype=torch.int64)

    rank = sum(item is not None for item in key)
    sample = torch.empty(list(range(2, 2 + rank)), device="meta")  # all sizes differ; those of indices are one
    found = sample[tuple(map(stand_in, key))]
    return [size - 2 if size > 1 else None for size in found.shape]


def numbered(maps: Maps, key: Sequence[Any], like: int) -> tuple[list[Any], list[Node]]:
    """The key with lists, and tensors on another device than the map, as vectors that are made once per step."""
    device, nodes, made = maps.program.values[like].device, [], []
    for item in key:
        on_other_device = isinstance(item, Ref) and maps.program.values[item.value].device != device
        if item is None or isinstance(item, (slice, int)) or (isinstance(item, Ref) and not on_other_device):
            made.append(item)
            continue
        shape = maps.shape(item.value) if isinstance(item, Ref) else torch.tensor(item).shape
        number = maps.new_value(shape, torch.int64, like=like)
        nodes.append(_index(item, number, device))
        made.append(Ref(number))
    return made, nodes


def _index(item: Any, number: int, device: torch.device) -> VectorOp:
    if isinstance(item, Ref):
        return VectorOp(lambda env: (env[item.value].to(device),), (item.value,), (number,))
    dtype = None if torch.tensor(item).numel() else torch.int64  # of an empty list
    return VectorOp(lambda _env: (torch.tensor(item, dtype=dtype, device=device),), (), (number,))


def _positions() -> Refusal:
    return Refusal("cannot index single positions of the image; use slices")


@rule("__getitem__", "narrow")
def getitem(op: Op, maps: Maps) -> Local | list[Node]:
    value = op.inputs[0]
    if value not in maps or any(v in maps for v in op.inputs[1:]):
        raise Refusal(
            "cannot index with a tensor that depends on the image; use F.embedding(index, table), gather or torch.where"
        )
    shape, axes = maps.shape(value), maps.axes[value]
    if op.name == "narrow":
        given = arguments(op, "input dim start length")
        dim = given["dim"] % len(shape)
        index: Any = (slice(None),) * dim + (slice(given["start"], given["start"] + given["length"]),)
    else:
        index = op.args[1]
    key = list(spelt_out(index, len(shape)))
    where = [i for i, item in enumerate(key) if item is not None]
    if value in maps.joined:
        first, dim = maps.joined[value]
        most = key[where[dim]]
        cut = [most if i == where[dim] else slice(None) for i in range(len(key))]
        if isinstance(most, slice) and key == cut and most.indices(shape[dim])[::2] == (0, 1):
            length = most.indices(shape[dim])[1]
            if length >= maps.shape(first)[dim]:
                return joined_mirror(op, maps, first, dim, length)
    accesses: list[Access] = []
    for i, axis in enumerate(axes):
        item = key[where[axis]]
        if not isinstance(item, slice):
            raise _positions()
        if value in maps.flat:
            if item.indices(shape[axis]) != (0, shape[axis], 1):
                raise _positions()
            accesses.append(maps.pointwise(value)[i])
            key[where[axis]] = slice(None)
            continue
        start, stop, step = item.indices(shape[axis])
        if step < 1:
            raise Refusal("a slice of an image axis must have a positive step")
        accesses.append(Window(shape[axis], len(range(start, stop, step)), 1, step, -start))
        key[where[axis]] = slice(None, None, step)
    came = origins(maps, key)
    key, made = numbered(maps, key, value)
    tile_key = tuple(key)

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (env[value][bind(tile_key, env)],)

    own = replace(op, inputs=(value, *refs(tile_key)))
    local = Local(own, {value: (accesses[0], accesses[1])}, ((came.index(axes[0]), came.index(axes[1])),), run)
    return [*made, local] if made else local


_ALONG_INDEX = {
    "take_along_dim": "input indices dim",
    **dict.fromkeys(
        ("gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_reduce"), "input dim index"
    ),
}


@rule(*_ALONG_INDEX)
def along_index(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    """Channels selected by an index, for all pixels or per pixel; or a few positions of a map."""
    dim, name = arguments(op, _ALONG_INDEX[op.name.removesuffix("_")])["dim"], op.name
    first = maps.inputs(op)[0]
    rank, axes, extent = len(maps.shape(first)), maps.axes[first], maps.extent(first)
    if dim is None:
        raise Refusal(f"'{name}' needs a dimension; name it with dim=")
    if len(maps.shape(op.outputs[0])) != rank:
        raise Refusal(f"'{name}' needs an index with as many dimensions as the map")
    if dim % rank in axes:
        if name == "gather" and maps.inputs(op) == [op.inputs[0]]:
            return Whole(op)
        raise Refusal(f"'{name}' cannot select positions of the image")
    full = [v for v in op.inputs if len(maps.shape(v)) == rank]
    op, made = promoted(op, maps, axes, rank, among=full)
    full = [v for v in op.inputs if len(maps.shape(v)) == rank]
    if any(v not in maps or maps.axes[v] != axes or maps.extent(v) != extent for v in full):
        raise Refusal(f"'{name}' needs tensors with a value for each position of the image")
    local = Local(op, {v: maps.pointwise(v) for v in full}, (axes,), replay(op))
    return [*made, local] if made else local


@rule("repeat_interleave")
def repeat_interleave(op: Op, maps: Maps) -> Local:
    """Repeats channels per pixel; repeats rows or columns as a nearest upsampling."""
    given = arguments(op, "input repeats dim output_size")
    value, repeats = op.inputs[0], given["repeats"]
    if value not in maps or given["dim"] is None:
        raise Refusal("'repeat_interleave' needs a dimension and repeats that do not depend on the image; name dim=")
    shape, axes = maps.shape(value), maps.axes[value]
    dim = given["dim"] % len(shape)
    if dim not in axes:
        return Local(op, {value: maps.pointwise(value)}, (axes,), replay(op))
    if not isinstance(repeats, int) or value in maps.flat:
        raise Refusal("'repeat_interleave' must repeat all rows or columns equally often; pass one number")
    access = Gather(shape[dim], shape[dim] * repeats, tuple(o // repeats for o in range(shape[dim] * repeats)))
    reads = list(maps.pointwise(value))
    reads[axes.index(dim)] = access

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        lo, hi = (block.rows, block.cols)[axes.index(dim)]
        return (env[value].repeat_interleave(repeats, dim).narrow(dim, lo % repeats, hi - lo),)

    return Local(op, {value: (reads[0], reads[1])}, (axes,), run)


@rule("embedding", "one_hot")
def embedding(op: Op, maps: Maps) -> Local:
    """Looks up a row of a table (of the unit matrix) for each position; the row is a new dimension."""
    value = op.inputs[0]
    if value not in maps:
        raise Refusal(f"'{op.name}' cannot use a table that depends on the image")
    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))
