"""Rules of ops that write into a map: assignment to channels or to a region, by a mask, copies and fills.

A write makes a new map of the old one; who reads the old one goes on reading it.
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
    """y[mask] = v, with one truth value for each element, or for all that the last dimensions hold."""
    more = len(maps.shape(target)) - len(maps.shape(mask))
    fits = maps.shape(target)[: len(maps.shape(mask))] == maps.shape(mask) and (mask in maps or not more)
    if not fits or (isinstance(written, Ref) and maps.shape(written.value)):
        raise Refusal("an assignment by a mask of another shape; use torch.where")
    over = target if target in maps else mask
    axes, rank = maps.axes[over], len(maps.shape(target))
    own, made = promoted(_renamed_call(op, (target, mask)), maps, axes, rank, among=() if more else None)
    here, there = own.inputs
    if here not in maps or maps.extent(here) != maps.extent(there) or maps.axes[here] != maps.axes[there]:
        raise Refusal("an assignment by a mask whose image axes lie elsewhere; use torch.where")

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        holds = env[there].reshape(*env[there].shape, *[1] * more)
        return (torch.where(holds, bind(written, env), env[here]).to(env[here].dtype),)

    own.inputs = tuple(dict.fromkeys((here, there, *refs(written))))
    return [*made, Local(own, {v: maps.pointwise(v) for v in (here, there)}, (axes,), run)]


def _renamed_call(op: Op, inputs: tuple[int, ...]) -> Op:
    """A call of our own that stands in the place of another and takes these values."""
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
            raise Refusal("an assignment picks positions of the image by a list; use torch.where with a mask")
        self.gone = isinstance(item, int)
        start, stop, step = (slice(item % size, item % size + 1) if isinstance(item, int) else item).indices(size)
        if step < 1:
            raise Refusal("a slice runs backwards along an image axis")
        self.size, self.start, self.step, self.count = size, start, step, len(range(start, stop, step))

    def inside(self, span: tuple[int, int]) -> slice | int | None:
        """Those within `span`, counted from its beginning, as an index; None for none."""
        lo, hi = span
        first = max(0, -((self.start - lo) // self.step))
        last = min(self.count, -((self.start - hi) // self.step))
        if first >= last:  # a write to nothing at all has a gradient, of zeros
            return slice(0, 0) if not self.count else None
        begin = self.start + first * self.step - lo
        return begin if self.gone else slice(begin, begin + (last - first - 1) * self.step + 1, self.step)


def assign(op: Op, maps: Maps, target: int, key: Any, written: Any) -> Local | list[Node]:
    """`target[key] = written` as a new map; whoever reads `target` elsewhere reads the old one.

        y[:, :2] = v                   per pixel
        y[:, :, 1:-1, 1:-1] = v        the window of v that lies under the block, as a padding is
        y[:, :, 0] = 0                 the part of the row that lies in the block

    Args:
        key: what stands between the brackets, with Refs in place of tensors.
        written: a Ref or a number.
    """
    if any(v in maps for v in refs(key)):
        raise Refusal("an assignment goes by an index that depends on the image; use torch.where or scatter")
    shape, value = maps.shape(target), written.value if isinstance(written, Ref) else None
    items = spelt_out(key, len(shape))
    if any(item is None for item in items):
        raise Refusal("an assignment with None between its brackets; leave it out")
    place = _Place.of(maps, target, value, items)
    nodes: list[Node] = []
    reads: dict[int, tuple[Access, Access]] = {}
    background = None if target in maps else _constant(maps, target)
    if background is None:
        target, nodes = _as_map(op, maps, target, place)
        reads[target] = maps.pointwise(target)
    if value is not None:
        value, made, read = _read_written(op, maps, target, value, place)
        nodes += made
        reads |= read
    if value not in reads and not place.whole:
        # What is written depends on where the block lies, which a window would not tell.
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
            x = env[value].new_full(place.size_in(block), background, dtype=dtype)
        index = place.index(items, block)
        if index is not None:
            x[bind(index, env)] = number if value is None else env[value]
        return (x,)

    inputs = [*reads, *([] if value is None else [value]), *refs(items)]
    return [*nodes, Local(_renamed_call(op, tuple(dict.fromkeys(inputs))), reads, (place.axes,), run)]


@dataclass(frozen=True)
class _Place:
    """Where an assignment writes.

    Attributes:
        shape: of the target.
        axes: its image axes.
        regions: what is written of each of them.
        rank: dimensions of what the brackets pick.
        behind: where the image axes are in that, counted from after; None where an index has taken one away.
    """

    shape: Sequence[int]
    axes: tuple[int, int]
    regions: tuple[_Region, _Region]
    rank: int
    behind: tuple[int | None, int | None]

    @classmethod
    def of(cls, maps: Maps, target: int, value: int | None, items: Sequence[Any]) -> _Place:
        """The place that `items` name of a target, which may be a tensor of the map's size that is filled by and by."""
        shape, came = maps.shape(target), origins(maps, items)
        if target in maps:
            axes = maps.axes[target]
        else:
            assert value is not None
            shift = len(came) - len(maps.shape(value))
            found = [came[axis + shift] if axis + shift >= 0 else None for axis in maps.axes[value]]
            if found[0] is None or found[1] is None or found[0] == found[1]:
                raise Refusal("an assignment writes a map into a tensor that has no such image axes; permute it before")
            axes = (found[0], found[1])
        rows, cols = (_Region(items[axis], shape[axis]) for axis in axes)
        top, left = (came.index(axis) - len(came) if axis in came else None for axis in axes)
        place = cls(shape, axes, (rows, cols), len(came), (top, left))
        if place.flat and not place.whole:
            raise Refusal("an assignment picks positions of a flattened map")
        return place

    @property
    def flat(self) -> bool:
        """Whether the target is a map whose positions lie in one dimension."""
        return self.axes[0] == self.axes[1]

    @property
    def whole(self) -> bool:
        """Whether all of the image is written."""
        return all(region.count == region.size and not region.gone for region in self.regions)

    def size_in(self, block: Block) -> list[int]:
        """The shape of a block of the target."""
        size = list(self.shape)
        size[self.axes[0]], size[self.axes[1]] = (span[1] - span[0] for span in (block.rows, block.cols))
        return size

    def index(self, items: Sequence[Any], block: Block) -> tuple[Any, ...] | None:
        """What is written of a block, as an index of it; None for nothing."""
        result = list(items)
        for axis, region, span in zip(self.axes, self.regions, (block.rows, block.cols), strict=True):
            here = slice(None) if self.flat else region.inside(span)
            if here is None:
                return None
            result[axis] = here
        return tuple(result)


def _as_map(op: Op, maps: Maps, target: int, place: _Place) -> tuple[int, list[Node]]:
    """The target of an assignment as a map, and what makes it one."""
    if target in maps:
        return target, []
    size = place.shape[place.axes[0]], place.shape[place.axes[1]]
    own, nodes = promoted(_renamed_call(op, (target,)), maps, place.axes, len(place.shape), size=size)
    if not nodes:
        raise Refusal("an assignment writes a map into a tensor of another size")
    return own.inputs[0], nodes


def _read_written(
    op: Op, maps: Maps, target: int, value: int, place: _Place
) -> tuple[int, list[Node], dict[int, tuple[Access, Access]]]:
    """The tensor that is written, what makes a map of it, and how that is read; one with the same value at every
    position of the image is read whole.
    """
    if value in maps:
        rows, cols = place.regions
        access = maps.pointwise(value) if place.flat else (_under(rows), _under(cols))
        lies = tuple(axis - len(maps.shape(value)) for axis in maps.axes[value])
        if place.flat:
            same = value in maps.flat and maps.flat[value] == maps.flat[target]
        else:
            same = maps.size(value) == (rows.count, cols.count)
        if not same or lies != place.behind:
            raise Refusal("an assignment writes a map whose image axes or size differ from those of the place")
        return value, [], {value: access}
    if not any(_depends(maps.shape(value), axis) for axis in place.behind):
        return value, [], {}
    if not place.whole:
        raise Refusal("an assignment writes a tensor with a value for each position into a region; pad it before")
    axes = (place.behind[0] or 0) + place.rank, (place.behind[1] or 0) + place.rank
    own, nodes = promoted(_renamed_call(op, (value, target)), maps, axes, place.rank, among=(value,))
    return own.inputs[0], nodes, {own.inputs[0]: maps.pointwise(own.inputs[0])}


def _under(region: _Region) -> Window:
    """How a map lies under the region of another that it is written to."""
    if region.step != 1 or region.gone:
        raise Refusal("an assignment writes a map to every n-th row or column, or to one; use torch.where or cat")
    return Window(region.count, region.size, pad=region.start)


def _depends(shape: Sequence[int], axis: int | None) -> bool:
    """Whether a tensor has more than one value along an axis that is counted from after."""
    return axis is not None and -axis <= len(shape) and shape[axis] != 1


_CONSTANTS = {"zeros": 0.0, "new_zeros": 0.0, "ones": 1.0, "new_ones": 1.0, "empty": 0.0, "new_empty": 0.0}


def _constant(maps: Maps, value: int) -> float | None:
    """The number that a tensor made in the forward is filled with; nothing of it need be there."""
    maker = next((op for op in maps.program.ops if value in op.outputs), None)
    return None if maker is None or maker.mutated else _CONSTANTS.get(maker.name)
