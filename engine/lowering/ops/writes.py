"""Rules of ops that write into a map: assignment to channels or to a region, by a mask, copies and fills.

A write makes a new map of the old one; who reads the old one goes on reading it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...capture.trace import Op, Ref, bind, refs
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
    came = origins(maps, items)
    if target in maps:
        axes = maps.axes[target]
    else:  # a tensor of the map's size that is filled by and by
        assert value is not None
        shift = len(came) - len(maps.shape(value))
        found = [came[axis + shift] if axis + shift >= 0 else None for axis in maps.axes[value]]
        if found[0] is None or found[1] is None or found[0] == found[1]:
            raise Refusal("an assignment writes a map into a tensor that has no such image axes; permute it before")
        axes = (found[0], found[1])
    flat = axes[0] == axes[1]
    regions = [_Region(items[axis], shape[axis]) for axis in axes]
    whole = all(r.count == r.size and not r.gone for r in regions)
    if flat and not whole:
        raise Refusal("an assignment picks positions of a flattened map")
    behind = [came.index(axis) - len(came) if axis in came else None for axis in axes]

    nodes: list[Node] = []
    reads: dict[int, tuple[Access, Access]] = {}
    background = None if target in maps else _constant(maps, target)
    if target in maps:
        reads[target] = maps.pointwise(target)
    elif background is None:
        size = shape[axes[0]], shape[axes[1]]
        own, nodes = promoted(_renamed_call(op, (target,)), maps, axes, len(shape), size=size)
        target = own.inputs[0]
        if not nodes:
            raise Refusal("an assignment writes a map into a tensor of another size")
        reads[target] = maps.pointwise(target)
    if value is not None and value in maps:
        if flat:
            reads[value] = maps.pointwise(value)
        else:
            reads[value] = _under(regions[0]), _under(regions[1])
        lies = [axis - len(maps.shape(value)) for axis in maps.axes[value]]
        same = maps.flat[value] == maps.flat[target] if flat and value in maps.flat else not flat
        if not same or lies != behind or (not flat and maps.size(value) != tuple(r.count for r in regions)):
            raise Refusal("an assignment writes a map whose image axes or size differ from those of the place")
    elif value is not None and any(_depends(maps.shape(value), axis) for axis in behind):
        if not whole:
            raise Refusal("an assignment writes a tensor with a value for each position into a region; pad it before")
        places = behind[0] or 0, behind[1] or 0
        own, made = promoted(
            _renamed_call(op, (value, target)),
            maps,
            (places[0] + len(came), places[1] + len(came)),
            len(came),
            among=(value,),
        )
        nodes = [*nodes, *made]
        value = own.inputs[0]
        reads[value] = maps.pointwise(value)
    elif not whole:
        # What is written depends on where the block lies, which a window would not tell.
        rows, cols = maps.size(target)
        reads[target] = Gather(rows, rows, tuple(range(rows))), Gather(cols, cols, tuple(range(cols)))
    dtype = maps.program.values[op.outputs[0]].dtype
    number: Any = None if value is not None else written

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        if background is None:
            x = env[target].clone()
        else:
            size = list(shape)
            size[axes[0]], size[axes[1]] = (span[1] - span[0] for span in (block.rows, block.cols))
            assert value is not None
            x = env[value].new_full(size, background, dtype=dtype)
        place = list(items)
        for axis, region, span in zip(axes, regions, (block.rows, block.cols), strict=True):
            here = slice(None) if flat else region.inside(span)
            if here is None:
                return (x,)
            place[axis] = here
        x[bind(tuple(place), env)] = number if value is None else env[value]
        return (x,)

    over = next(iter(reads))
    items, made = numbered(maps, items, over)
    nodes += made
    inputs = [*reads, *([] if value is None else [value]), *refs(items)]
    return [*nodes, Local(_renamed_call(op, tuple(dict.fromkeys(inputs))), reads, (axes,), run)]


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
