"""Rules of ops that move values without computing: permutes, reshapes, splits, concatenation, slices, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..geometry import Access, Window
from ..trace import Op, Ref
from .base import Axes, Block, Env, Local, Maps, Refusal, Run, Whole, arguments, dimensions, replay, rule
from .reflect import mirrored_pad


def _local(op: Op, maps: Maps, value: int, axes: Axes, run: Run | None = None) -> Local:
    return Local(op, {value: maps.pointwise(value)}, (axes,) * len(op.outputs), run or replay(op))


def _ints(op: Op, name: str) -> tuple[int, ...]:
    """The variadic integers of a method call: f(x, 0, 2, 3, 1), f(x, (0, 2, 3, 1)) or f(x, dims=...)."""
    given = op.kwargs[name] if name in op.kwargs else op.args[1:]
    if len(given) == 1 and not isinstance(given[0], int):
        given = given[0]
    return tuple(given)


@rule("permute")
def permute(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    dims = dimensions(_ints(op, "dims"), len(maps.shape(value)))
    h, w = maps.axes[value]
    return _local(op, maps, value, (dims.index(h), dims.index(w)))


@rule("transpose", "swapaxes", "swapdims")
def transpose(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    rest = [*op.args[1:], *op.kwargs.values()]
    a, b = dimensions(rest, len(maps.shape(value)))
    swap = {a: b, b: a}
    h, w = maps.axes[value]
    return _local(op, maps, value, (swap.get(h, h), swap.get(w, w)))


@rule("unsqueeze")
def unsqueeze(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    rank = len(maps.shape(value))
    dim = arguments(op, "input dim")["dim"] % (rank + 1)
    h, w = maps.axes[value]
    return _local(op, maps, value, (h + (dim <= h), w + (dim <= w)))


@rule("squeeze")
def squeeze(op: Op, maps: Maps) -> Local | Whole:
    value = op.inputs[0]
    dim = arguments(op, "input dim")["dim"]
    if dim is None:
        raise Refusal("'squeeze' without a dimension; name the dimension")
    shape = maps.shape(value)
    dims = [d for d in dimensions(dim, len(shape)) if shape[d] == 1]
    if set(dims) & set(maps.axes[value]):
        return Whole(op)
    h, w = maps.axes[value]
    return _local(op, maps, value, (h - sum(d < h for d in dims), w - sum(d < w for d in dims)))


def _kept_axis(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """Where dimension `axis` of shape `before` stands unchanged in shape `after`."""
    for position, size in enumerate(after):
        if (
            size == before[axis]
            and math.prod(after[:position]) == math.prod(before[:axis])
            and math.prod(after[position + 1 :]) == math.prod(before[axis + 1 :])
        ):
            return position
    return None


@rule("reshape", "view", "reshape_as", "view_as", "flatten", "unflatten")
def reshape(op: Op, maps: Maps) -> Local | Whole:
    """A change of shape that leaves both image axes whole; else the op needs the assembled map."""
    value = op.inputs[0]
    before, after = maps.shape(value), maps.shape(op.outputs[0])
    if maps.program.values[value].dtype != maps.program.values[op.outputs[0]].dtype:
        raise Refusal("'view' reinterprets the bytes of a map")
    h, w = (_kept_axis(before, after, axis) for axis in maps.axes[value])
    if h is None or w is None or h == w:
        return Whole(op)
    old_h, old_w = maps.axes[value]

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        x = env[value]
        shape = list(after)
        shape[h], shape[w] = x.shape[old_h], x.shape[old_w]
        return (x.reshape(shape),)

    return _local(op, maps, value, (h, w), run)


@rule("expand", "expand_as", "broadcast_to")
def expand(op: Op, maps: Maps) -> Local:
    value, out = op.inputs[0], op.outputs[0]
    if value not in maps:
        raise Refusal(f"'{op.name}' spreads a small tensor over the image; let it broadcast instead")
    shift = len(maps.shape(out)) - len(maps.shape(value))
    h, w = (axis + shift for axis in maps.axes[value])

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        shape = list(maps.shape(out))
        shape[h], shape[w] = -1, -1
        return (env[value].expand(shape),)

    if maps.shape(out)[h] != maps.size(value)[0] or maps.shape(out)[w] != maps.size(value)[1]:
        raise Refusal(f"'{op.name}' spreads a map along the image axes")
    return _local(op, maps, value, (h, w), run)


@rule("repeat", "tile")
def repeat(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    counts = _ints(op, "dims" if op.name == "tile" else "repeats")
    rank = max(len(counts), len(maps.shape(value)))
    counts = (1,) * (rank - len(counts)) + counts
    h, w = (axis + rank - len(maps.shape(value)) for axis in maps.axes[value])
    if counts[h] != 1 or counts[w] != 1:
        raise Refusal(f"'{op.name}' repeats the map along the image axes")
    return _local(op, maps, value, (h, w))


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    dim = arguments(op, "input sections dim", dim=0)["dim"] % len(maps.shape(value))
    if dim in maps.axes[value]:
        raise Refusal(f"'{op.name}' cuts the map along an image axis")
    return _local(op, maps, value, maps.axes[value])


@rule("unbind")
def unbind(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    dim = arguments(op, "input dim", dim=0)["dim"] % len(maps.shape(value))
    h, w = maps.axes[value]
    if dim in (h, w):
        raise Refusal("'unbind' cuts the map along an image axis")
    return _local(op, maps, value, (h - (dim < h), w - (dim < w)))


@rule("select", "index_select")
def select(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    dim = arguments(op, "input dim")["dim"] % len(maps.shape(value))
    h, w = maps.axes[value]
    if dim in (h, w):
        raise Refusal(f"'{op.name}' picks positions of the image")
    drop = op.name == "select"
    return _local(op, maps, value, (h - (drop and dim < h), w - (drop and dim < w)))


@rule("cat", "concat", "concatenate", "stack")
def cat(op: Op, maps: Maps) -> Local:
    given = arguments(op, "tensors dim", dim=0)
    values = [ref.value for ref in given["tensors"]]
    if any(v not in maps for v in values):
        raise Refusal(f"'{op.name}' joins a map with a tensor that is none")
    if len({maps.axes[v] for v in values}) > 1 or len({maps.size(v) for v in values}) > 1:
        raise Refusal(f"'{op.name}' joins maps whose image axes differ")
    h, w = maps.axes[values[0]]
    rank = len(maps.shape(op.outputs[0]))
    dim = given["dim"] % rank
    if op.name == "stack":
        h, w = h + (dim <= h), w + (dim <= w)
    elif dim in (h, w):
        raise Refusal(f"'{op.name}' joins maps along an image axis")
    return Local(op, {v: maps.pointwise(v) for v in values}, ((h, w),), replay(op))


@rule("__getitem__", "narrow")
def getitem(op: Op, maps: Maps) -> Local:
    """Slices: of channels per pixel, of an image axis a window with stride (a crop)."""
    value = op.inputs[0]
    if value not in maps or len(op.inputs) > 1:
        raise Refusal("indexing with a tensor")
    shape, axes = maps.shape(value), maps.axes[value]
    if op.name == "narrow":
        given = arguments(op, "input dim start length")
        dim = given["dim"] % len(shape)
        index: Any = (slice(None),) * dim + (slice(given["start"], given["start"] + given["length"]),)
    else:
        index = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
    used = sum(item is not None and item is not Ellipsis for item in index)
    if not any(item is Ellipsis for item in index):
        index = (*index, Ellipsis)
    spot = next(i for i, item in enumerate(index) if item is Ellipsis)
    index = (*index[:spot], *[slice(None)] * (len(shape) - used), *index[spot + 1 :])

    accesses: list[Access] = []
    out_axes: list[int] = []
    tile_index: list[Any] = []
    dim = position = 0
    for item in index:
        if item is None:
            tile_index.append(None)
            position += 1
            continue
        if dim in axes:
            if not isinstance(item, slice):
                raise Refusal("indexing picks positions of the image")
            start, stop, step = item.indices(shape[dim])
            if step < 1:
                raise Refusal("a slice runs backwards along an image axis")
            accesses.append(Window(shape[dim], len(range(start, stop, step)), 1, step, -start))
            out_axes.append(position)
            tile_index.append(slice(None, None, step))
            position += 1
        elif isinstance(item, (slice, int)):
            tile_index.append(item)
            position += isinstance(item, slice)
        else:
            raise Refusal("indexing with a list")
        dim += 1
    key = tuple(tile_index)

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (env[value][key],)

    return Local(op, {value: (accesses[0], accesses[1])}, ((out_axes[0], out_axes[1]),), run)


@rule("pad")
def pad(op: Op, maps: Maps) -> Local:
    """Constant padding is a window of one pixel that begins outside; negative amounts crop. Others repeat pixels."""
    given = arguments(op, "input pad mode value", mode="constant")
    value = given["input"].value
    rank = len(maps.shape(value))
    before, after = [0] * rank, [0] * rank
    for i in range(len(given["pad"]) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = given["pad"][2 * i], given["pad"][2 * i + 1]
    h, w = maps.axes[value]
    if given["mode"] != "constant" and any(given["pad"]):
        spatial = (before[h], after[h], before[w], after[w])
        if given["mode"] == "circular" or sum(spatial) != sum(given["pad"]) or min(given["pad"]) < 0:
            raise Refusal(f"padding with mode='{given['mode']}' is not possible yet; use zeros")
        return mirrored_pad(op, maps, value, spatial, given["mode"] == "replicate")
    out = maps.shape(op.outputs[0])
    size = maps.size(value)
    reads = {value: (Window(size[0], out[h], pad=before[h]), Window(size[1], out[w], pad=before[w]))}
    fill = given["value"] or 0.0
    if isinstance(fill, Ref):
        raise Refusal("padding with a computed value")

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        first, last = list(before), list(after)
        first[h], last[h], first[w], last[w] = block.pad
        amounts = [n for d in reversed(range(rank)) for n in (first[d], last[d])]
        return (F.pad(env[value], amounts, value=fill),)

    return Local(op, reads, ((h, w),), run)


@rule("pixel_unshuffle")
def pixel_unshuffle(op: Op, maps: Maps) -> Local:
    given = arguments(op, "input downscale_factor")
    value, r = given["input"].value, given["downscale_factor"]
    height, width = maps.size(value)
    reads = {value: (Window(height, height // r, r, r), Window(width, width // r, r, r))}

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (F.pixel_unshuffle(env[value], r),)

    return Local(op, reads, ((2, 3),), run)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    if 1 in maps.axes[value]:
        raise Refusal(f"'{op.name}' takes an image axis for the channels")
    return _local(op, maps, value, maps.axes[value])
