"""Rules of ops that move values without computing: permutes, splits, concatenation, slices, padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..geometry import Access, Window
from ..trace import Op, Ref
from .base import (
    Axes,
    Block,
    Env,
    Flat,
    Local,
    Maps,
    Node,
    Refusal,
    Run,
    Whole,
    arguments,
    dimensions,
    need_nchw,
    pair,
    replay,
    rule,
)
from .circular import circular_pad
from .promote import promoted, spread, spread_strip
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


@rule("movedim", "moveaxis")
def movedim(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    rank = len(maps.shape(value))
    given = arguments(op, "input source destination")
    source, destination = dimensions(given["source"], rank), dimensions(given["destination"], rank)
    moved = dict(zip(destination, source, strict=True))
    left = iter(d for d in range(rank) if d not in source)
    order = [moved[d] if d in moved else next(left) for d in range(rank)]
    h, w = maps.axes[value]
    return _local(op, maps, value, (order.index(h), order.index(w)))


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


@rule("expand", "expand_as", "broadcast_to")
def expand(op: Op, maps: Maps) -> Local | list[Node]:
    value, out = op.inputs[0], op.outputs[0]
    if value not in maps:  # expand_as
        over = op.inputs[1]
        ones = [1] * (len(maps.shape(out)) - len(maps.shape(value))) + list(maps.shape(value))
        one = [ones[axis] == 1 for axis in maps.axes[over]]
        if sorted(one) == [False, True] and over not in maps.flat:  # a value for each row or column
            return spread_strip(op, maps, value, ones, maps.axes[over], maps.size(over), out)[0]
        if maps.merged(over) or any(ones[axis] != 1 for axis in maps.axes[over]):
            raise Refusal(f"'{op.name}' spreads a tensor over the image that depends on the position already")
        return spread(op, maps, value, over, out, maps.axes[over])
    shift = len(maps.shape(out)) - len(maps.shape(value))
    h, w = (axis + shift for axis in maps.axes[value])
    if any(maps.shape(out)[axis + shift] != maps.shape(value)[axis] for axis in maps.axes[value]):
        raise Refusal(f"'{op.name}' spreads a map along the image axes")
    shape = list(maps.shape(out))
    shape[h], shape[w] = -1, -1

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (env[value].expand(shape),)

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
def cat(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    some = maps.inputs(op)[0]
    along = arguments(op, "tensors dim", dim=0)["dim"] % len(maps.shape(op.outputs[0]))
    if some in maps.flat and op.name != "stack" and along in maps.axes[some]:
        return Whole(op)  # a token more: what follows (attention pooling) sees all of them
    op, made = promoted(op, maps, maps.axes[some], len(maps.shape(some)))
    given = arguments(op, "tensors dim", dim=0)
    values = [ref.value for ref in given["tensors"]]
    if any(v not in maps for v in values):
        raise Refusal(f"'{op.name}' joins a map with a tensor that is none")
    if len({maps.axes[v] for v in values}) > 1 or len({maps.extent(v) for v in values}) > 1:
        raise Refusal(f"'{op.name}' joins maps whose image axes differ")
    h, w = maps.axes[values[0]]
    rank = len(maps.shape(op.outputs[0]))
    dim = given["dim"] % rank
    if op.name == "stack":
        h, w = h + (dim <= h), w + (dim <= w)
    elif dim in (h, w):
        raise Refusal(f"'{op.name}' joins maps along an image axis")
    local = Local(op, {v: maps.pointwise(v) for v in values}, ((h, w),), replay(op))
    return [*made, local] if made else local


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
        if dim in axes and value in maps.flat:
            if not isinstance(item, slice) or item.indices(shape[dim]) != (0, shape[dim], 1):
                raise Refusal("indexing picks positions of the image")
            accesses = list(maps.pointwise(value))
            out_axes = [position, position]
            tile_index.append(slice(None))
            position += 1
        elif dim in axes:
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
def pad(op: Op, maps: Maps) -> Local | list[Node]:
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
        if value in maps.flat or sum(spatial) != sum(given["pad"]) or min(given["pad"]) < 0:
            raise Refusal(f"padding with mode='{given['mode']}' along other axes than the image's, or by less than 0")
        if given["mode"] == "circular":
            return circular_pad(op, maps, value, spatial)
        return mirrored_pad(op, maps, value, spatial, given["mode"] == "replicate")
    if value in maps.flat:
        if before[h] or after[h]:
            raise Refusal("'pad' lengthens a flattened map")
        return _local(op, maps, value, (h, w))
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


@rule("unfold")
def unfold(op: Op, maps: Maps) -> Local:
    """`Tensor.unfold`: windows of one axis as a further dimension. `F.unfold`: windows of a map as columns."""
    value = op.inputs[0]
    if op.func is F.unfold:
        return _columns(op, maps, value)
    given = arguments(op, "input dimension size step")
    shape, axes = maps.shape(value), maps.axes[value]
    dim, size, step = given["dimension"] % len(shape), given["size"], given["step"]
    if value in maps.flat:
        raise Refusal("'unfold' of a flattened map")
    reads = [*maps.pointwise(value)]
    if dim in axes:
        reads[axes.index(dim)] = Window(shape[dim], maps.shape(op.outputs[0])[dim], size, step)
    return Local(op, {value: (reads[0], reads[1])}, (axes,), replay(op))


def _columns(op: Op, maps: Maps, value: int) -> Local:
    given = arguments(op, "input kernel_size dilation padding stride", dilation=1, padding=0, stride=1)
    need_nchw(op, maps, value)
    kernel, dilation, padding, stride = (pair(given[n]) for n in ("kernel_size", "dilation", "padding", "stride"))
    windows = [
        Window(n, (n + 2 * p - d * (k - 1) - 1) // s + 1, k, s, p, d)
        for n, k, d, p, s in zip(maps.size(value), kernel, dilation, padding, stride, strict=True)
    ]

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        top, bottom, left, right = block.pad
        return (F.unfold(F.pad(env[value], (left, right, top, bottom)), kernel, dilation, 0, stride),)

    maps.flat[op.outputs[0]] = Flat(windows[0].size_out, windows[1].size_out)
    return Local(op, {value: (windows[0], windows[1])}, ((2, 2),), run, fill=0.0)


@rule("pixel_unshuffle")
def pixel_unshuffle(op: Op, maps: Maps) -> Local:
    given = arguments(op, "input downscale_factor")
    value, r = given["input"].value, given["downscale_factor"]
    need_nchw(op, maps, value)
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
