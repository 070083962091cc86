"""Rules of ops that write into a map: assignment to channels or to a region, by a mask, copies and fills.

A write makes a new map from the old one; ops that read the old map still read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...capture.program import Op, Ref, bind, refs
from ..geometry import Access, Gather, Window
from .base import Block, Env, Local, Maps, Node, Refusal, arguments, rule
from .indices import numbered, origins, spelt_out
from .promote import promoted


@rule("__setitem__")
def setitem(op: Op, maps: Maps) -> Local | list[Node]:
    target, key, written = op.args
    mask = key[0] if isinstance(key, tuple) and len(key) == 1 else key
    if isinstance(mask, Ref) and maps.program.values[mask.value].dtype == torch.bool:
        return _where(op, maps, target.value, mask.value, written)
    return assign(op, maps, target.value, key, written)


def _where(op: Op, maps: Maps, target: int, mask: int, written: Any) -> Local | list[Node]:
    """y[mask] = v, with a mask value for each element, or for all elements of the last dimensions."""
    more = len(maps.shape(target)) - len(maps.shape(mask))
    fits = maps.shape(target)[: len(maps.shape(mask))] == maps.shape(mask) and (mask in maps or not more)
    if not fits or (isinstance(written, Ref) and maps.shape(written.value)):
        raise Refusal("cannot assign by a mask of another shape; use torch.where")
    over = target if target in maps else mask
    axes, rank = maps.axes[over], len(maps.shape(target))
    own, made = promoted(_renamed_call(op, (target, mask)), maps, axes, rank, among=() if more else None)
    target_map, mask_map = own.inputs
    if (
        target_map not in maps
        or maps.extent(target_map) != maps.extent(mask_map)
        or maps.axes[target_map] != maps.axes[mask_map]
    ):
        raise Refusal("cannot assign by a mask with other image axes; use torch.where")

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        holds = env[mask_map].reshape(*env[mask_map].shape, *[1] * more)
        return (torch.where(holds, bind(written, env), env[target_map]).to(env[target_map].dtype),)

    own.inputs = tuple(dict.fromkeys((target_map, mask_map, *refs(written))))
    return [*made, Local(own, {v: maps.pointwise(v) for v in (target_map, mask_map)}, (axes,), run)]


def _renamed_call(op: Op, inputs: tuple[int, ...]) -> Op:
    """A call that replaces another and reads these values."""
    return Op(op.func, "assigned", (), {}, inputs, op.outputs[:1], (), op.module, op.autocast, op.line)


@rule("slice_scatter", "select_scatter")
def scattered_slice(op: Op, maps: Maps) -> Local | list[Node]:
    names = "input src dim start end step" if op.name == "slice_scatter" else "input src dim start"
    given = arguments(op, names, dim=0, step=1)
    index = given.get("index", given["start"])
    before = [slice(None)] * (given["dim"] % len(maps.shape(given["input"].value)))
    item = slice(given["start"], given["end"], given["step"]) if op.name == "slice_scatter" else index
    return assign(op, maps, given["input"].value, (*before, item), given["src"])


@rule("index_fill", "index_copy")
def index_copy(op: Op, maps: Maps) -> Local | list[Node]:
    given = arguments(op, "input dim index written")
    written = given.get("source", given.get("value", given["written"]))
    before = [slice(None)] * (given["dim"] % len(maps.shape(given["input"].value)))
    return assign(op, maps, given["input"].value, (*before, given["index"]), written)


@rule("copy", "fill", "zero")
def fill(op: Op, maps: Maps) -> Local | list[Node]:
    given = arguments(op, "input written", written=0)
    written = given.get("src", given.get("value", given["written"]))
    return assign(op, maps, given["input"].value, Ellipsis, written)


class _Region:
    """The indices of one image axis that are written."""

    def __init__(self, item: Any, size: int):
        if not isinstance(item, (slice, int)):
            raise Refusal("cannot assign to positions of the image by a list; use torch.where with a mask")
        self.removed = isinstance(item, int)
        start, stop, step = (slice(item % size, item % size + 1) if isinstance(item, int) else item).indices(size)
        if step < 1:
            raise Refusal("a slice of an image axis must have a positive step")
        self.size, self.start, self.step, self.count = size, start, step, len(range(start, stop, step))

    def inside(self, span: tuple[int, int]) -> slice | int | None:
        """The written indices within `span`, counted from its beginning, as an index; None for none."""
        lo, hi = span
        first = max(0, -((self.start - lo) // self.step))
        last = min(self.count, -((self.start - hi) // self.step))
        if first >= last:  # a write to nothing at all has a gradient, of zeros
            return slice(0, 0) if not self.count else None
        begin = self.start + first * self.step - lo
        return begin if self.removed else slice(begin, begin + (last - first - 1) * self.step + 1, self.step)


def assign(op: Op, maps: Maps, target: int, key: Any, written: Any) -> Local | list[Node]:
    """`target[key] = written` as a new map; other ops that read `target` read the old one.

        y[:, :2] = v                   per pixel
        y[:, :, 1:-1, 1:-1] = v        the window of v under the block, like a padding
        y[:, :, 0] = 0                 the part of the row in the block

    Args:
        key: the index, with Refs instead of tensors.
        written: a Ref or a number.
    """
    if any(v in maps for v in refs(key)):
        raise Refusal("cannot assign by an index that depends on the image; use torch.where or scatter")
    shape, value = maps.shape(target), written.value if isinstance(written, Ref) else None
    items = spelt_out(key, len(shape))
    if any(item is None for item in items):
        raise Refusal("cannot assign by an index with None; leave None out")
    indexed = _Target.of(maps, target, value, items)
    nodes: list[Node] = []
    reads: dict[int, tuple[Access, Access]] = {}
    background = None if target in maps else _constant(maps, target)
    if background is None:
        target, nodes = _as_map(op, maps, target, indexed)
        reads[target] = maps.pointwise(target)
    if value is not None:
        value, made, read = _read_written(op, maps, target, value, indexed)
        nodes += made
        reads |= read
    if value not in reads and not indexed.whole:
        # The written part depends on the position of the block, which a window does not have.
        rows, cols = maps.size(target)
        reads[target] = Gather(rows, rows, tuple(range(rows))), Gather(cols, cols, tuple(range(cols)))
    items, made = numbered(maps, items, next(iter(reads)))
    nodes += made
    dtype = maps.program.values[op.outputs[0]].dtype
    number: Any = written

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        if background is None:
            x = env[target].clone()
        else:
            assert value is not None
            x = env[value].new_full(indexed.size_in(block), background, dtype=dtype)
        index = indexed.index(items, block)
        if index is not None:
            x[bind(index, env)] = number if value is None else env[value]
        return (x,)

    inputs = [*reads, *([] if value is None else [value]), *refs(items)]
    return [*nodes, Local(_renamed_call(op, tuple(dict.fromkeys(inputs))), reads, (indexed.axes,), run)]


@dataclass(frozen=True)
class _Target:
    """The part of the target that an assignment writes.

    Attributes:
        shape: the shape of the target.
        axes: its image axes.
        regions: the written indices of each image axis.
        rank: the rank of the indexed target.
        behind: the image axes of the indexed target, counted from the last dimension; None if an integer removed one.
    """

    shape: Sequence[int]
    axes: tuple[int, int]
    regions: tuple[_Region, _Region]
    rank: int
    behind: tuple[int | None, int | None]

    @classmethod
    def of(cls, maps: Maps, target: int, value: int | None, items: Sequence[Any]) -> _Target:
        """The part of a target that `items` index; the target may be a tensor that the forward fills."""
        shape, came = maps.shape(target), origins(maps, items)
        if target in maps:
            axes = maps.axes[target]
        else:
            assert value is not None
            shift = len(came) - len(maps.shape(value))
            found = [came[axis + shift] if axis + shift >= 0 else None for axis in maps.axes[value]]
            if found[0] is None or found[1] is None or found[0] == found[1]:
                raise Refusal("cannot assign a map to a tensor without matching image axes; permute it first")
            axes = (found[0], found[1])
        rows, cols = (_Region(items[axis], shape[axis]) for axis in axes)
        top, left = (came.index(axis) - len(came) if axis in came else None for axis in axes)
        indexed = cls(shape, axes, (rows, cols), len(came), (top, left))
        if indexed.flat and not indexed.whole:
            raise Refusal("cannot assign to some positions of a flattened map; assign before flattening")
        return indexed

    @property
    def flat(self) -> bool:
        """Whether the target is a flattened map."""
        return self.axes[0] == self.axes[1]

    @property
    def whole(self) -> bool:
        """Whether the whole image is written."""
        return all(region.count == region.size and not region.removed for region in self.regions)

    def size_in(self, block: Block) -> list[int]:
        """The shape of a block of the target."""
        size = list(self.shape)
        size[self.axes[0]], size[self.axes[1]] = (span[1] - span[0] for span in (block.rows, block.cols))
        return size

    def index(self, items: Sequence[Any], block: Block) -> tuple[Any, ...] | None:
        """The index of the written part of a block; None for nothing."""
        result = list(items)
        for axis, region, span in zip(self.axes, self.regions, (block.rows, block.cols), strict=True):
            part = slice(None) if self.flat else region.inside(span)
            if part is None:
                return None
            result[axis] = part
        return tuple(result)


def _as_map(op: Op, maps: Maps, target: int, indexed: _Target) -> tuple[int, list[Node]]:
    """The target of an assignment as a map, and the nodes that make it one."""
    if target in maps:
        return target, []
    size = indexed.shape[indexed.axes[0]], indexed.shape[indexed.axes[1]]
    own, nodes = promoted(_renamed_call(op, (target,)), maps, indexed.axes, len(indexed.shape), size=size)
    if not nodes:
        raise Refusal("cannot assign a map to a tensor of another height or width")
    return own.inputs[0], nodes


def _read_written(
    op: Op, maps: Maps, target: int, value: int, indexed: _Target
) -> tuple[int, list[Node], dict[int, tuple[Access, Access]]]:
    """The written tensor as a map, the nodes that make it one, and its accesses.

    A tensor with the same values at every position of the image is read whole.
    """
    if value in maps:
        rows, cols = indexed.regions
        access = maps.pointwise(value) if indexed.flat else (_access_of_region(rows), _access_of_region(cols))
        lies = tuple(axis - len(maps.shape(value)) for axis in maps.axes[value])
        if indexed.flat:
            same = value in maps.flat and maps.flat[value] == maps.flat[target]
        else:
            same = maps.size(value) == (rows.count, cols.count)
        if not same or lies != indexed.behind:
            raise Refusal("cannot assign a map whose image axes or size differ from those of the indexed target")
        return value, [], {value: access}
    if not any(_depends(maps.shape(value), axis) for axis in indexed.behind):
        return value, [], {}
    if not indexed.whole:
        raise Refusal("cannot assign a tensor with a value for each position to a region; pad it first")
    axes = (indexed.behind[0] or 0) + indexed.rank, (indexed.behind[1] or 0) + indexed.rank
    own, nodes = promoted(_renamed_call(op, (value, target)), maps, axes, indexed.rank, among=(value,))
    return own.inputs[0], nodes, {own.inputs[0]: maps.pointwise(own.inputs[0])}


def _access_of_region(region: _Region) -> Window:
    """The access to a map that is written to a region of another."""
    if region.step != 1 or region.removed:
        raise Refusal("cannot assign a map to every n-th row or column, or to a single one; use torch.where or cat")
    return Window(region.count, region.size, pad=region.start)


def _depends(shape: Sequence[int], axis: int | None) -> bool:
    """Whether a tensor has more than one value along an axis, which is counted from the last dimension (-1)."""
    return axis is not None and -axis <= len(shape) and shape[axis] != 1


_CONSTANTS = {"zeros": 0.0, "new_zeros": 0.0, "ones": 1.0, "new_ones": 1.0, "empty": 0.0, "new_empty": 0.0}


def _constant(maps: Maps, value: int) -> float | None:
    """The number that fills a tensor made in the forward, which then need not exist; None for other tensors."""
    maker = next((op for op in maps.program.ops if value in op.outputs), None)
    return None if maker is None or maker.mutated else _CONSTANTS.get(maker.name)
