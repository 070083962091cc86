"""Rules of ops that move values without computing: permutes, splits, concatenation, slices, padding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...capture.program import Op, Ref
from ..geometry import Access, Window
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
    VectorOp,
    Whole,
    arguments,
    axes_after,
    dimensions,
    integers,
    need_nchw,
    pair,
    replay,
    rule,
)
from .padding import circular_pad, joined_mirror, mirrored_pad, padded_depth
from .promote import mapped, promoted, spread, spread_strip


def _local(op: Op, maps: Maps, value: int, axes: Axes, run: Run | None = None) -> Local:
    return Local(op, {value: maps.pointwise(value)}, (axes,) * len(op.outputs), run or replay(op))


def moved_dimensions(op: Op, rank: int) -> list[int | None]:
    """For each dimension of the result of a move, its dimension before, or None for a new one.

    PyTorch itself determines them: the call is applied to a meta tensor whose sizes are all different.
    """
    sample = torch.empty(list(range(2, 2 + rank)), device="meta")
    (made,) = replay(op)({op.inputs[0]: sample}, Block((0, 1), (0, 1)))
    return [size - 2 if size > 1 else None for size in made.shape]


@rule("permute", "transpose", "swapaxes", "swapdims", "mT", "adjoint", "t", "T", "movedim", "moveaxis", "unsqueeze")
def move(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    rank = len(maps.shape(value))
    if op.name == "T" and rank != 2:
        raise Refusal("'T' of more than two dimensions is not supported; use permute")
    found = moved_dimensions(op, rank)
    h, w = (found.index(axis) for axis in maps.axes[value])
    return _local(op, maps, value, (h, w))


@rule("squeeze")
def squeeze(op: Op, maps: Maps) -> Local | Whole:
    value = op.inputs[0]
    dim = arguments(op, "input dim")["dim"]
    if dim is None:
        raise Refusal("'squeeze' needs a dimension; name it with dim=")
    shape = maps.shape(value)
    dims = [d for d in dimensions(dim, len(shape)) if shape[d] == 1]
    if set(dims) & set(maps.axes[value]):
        return Whole(op)
    return _local(op, maps, value, axes_after(maps.axes[value], dims, False))


@rule("expand", "expand_as", "broadcast_to")
def expand(op: Op, maps: Maps) -> Node | list[Node]:
    value, out = op.inputs[0], op.outputs[0]
    if value not in maps:  # expand_as
        over, shape = op.inputs[1], maps.shape(out)
        ones = [1] * (len(shape) - len(maps.shape(value))) + list(maps.shape(value))
        one = [ones[axis] == 1 for axis in maps.axes[over]]
        if sorted(one) == [False, True] and over not in maps.flat:  # a value for each row or column
            return spread_strip(op, maps, value, ones, maps.axes[over], maps.size(over), out)[0]
        if maps.merged(over) or any(ones[axis] != 1 for axis in maps.axes[over]):
            return VectorOp(
                lambda env: (env[value].expand(shape),), (value,), op.outputs
            )  # already of the image's size
        return spread(op, maps, value, {over: maps.pointwise(over)}, out, maps.axes[over])
    shift = len(maps.shape(out)) - len(maps.shape(value))
    h, w = (axis + shift for axis in maps.axes[value])
    if any(maps.shape(out)[axis + shift] != maps.shape(value)[axis] for axis in maps.axes[value]):
        raise Refusal(f"'{op.name}' cannot broadcast a map along the image axes")
    shape = list(maps.shape(out))
    shape[h], shape[w] = -1, -1

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (env[value].expand(shape),)

    return _local(op, maps, value, (h, w), run)


@rule("repeat", "tile")
def repeat(op: Op, maps: Maps) -> Local:
    value = op.inputs[0]
    counts = integers(op, "dims" if op.name == "tile" else "repeats")
    rank = max(len(counts), len(maps.shape(value)))
    counts = (1,) * (rank - len(counts)) + counts
    h, w = (axis + rank - len(maps.shape(value)) for axis in maps.axes[value])
    if counts[h] != 1 or counts[w] != 1:
        raise Refusal(f"'{op.name}' cannot repeat a map along the image axes")
    return _local(op, maps, value, (h, w))


_SPLITS = frozenset("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split".split())


@rule(*_SPLITS, "unbind", "select", "index_select")
def along_other_dimension(op: Op, maps: Maps) -> Local:
    """Splits and selections along a dimension that is not an image axis."""
    value = op.inputs[0]
    names = "input sections dim" if op.name in _SPLITS else "input dim"
    dim = arguments(op, names, dim=0)["dim"] % len(maps.shape(value))
    if dim in maps.axes[value]:
        what = "select positions of the image" if "select" in op.name else "split a map along an image axis"
        raise Refusal(f"'{op.name}' cannot {what}")
    return _local(op, maps, value, axes_after(maps.axes[value], (dim,), op.name not in ("unbind", "select")))


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
def cat(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    given = arguments(op, "tensors dim", dim={"hstack": 1, "dstack": 2}.get(op.name, 0))
    dim = given["dim"] % len(maps.shape(op.outputs[0]))
    some = maps.inputs(op)[0]
    if any(tuple(maps.shape(ref.value)) == (0,) for ref in given["tensors"]):
        raise Refusal(f"'{op.name}' cannot join an empty tensor; leave it out")
    if dim in maps.axes[some] and op.name != "stack":
        if some in maps.flat:
            return Whole(op)  # one more token: later ops (attention pooling) read all tokens
        first, *others = (ref.value for ref in given["tensors"])
        if [maps.mirrors.get(v) for v in others] == [(first, dim)]:
            maps.joined[op.outputs[0]] = first, dim
            return joined_mirror(op, maps, first, dim, 2 * maps.shape(first)[dim])
        return _end_to_end(op, maps, [ref.value for ref in given["tensors"]], dim)
    op, made = promoted(op, maps, maps.axes[some], len(maps.shape(some)))
    values = [ref.value for ref in arguments(op, "tensors")["tensors"]]
    if any(v not in maps for v in values):
        raise Refusal(f"'{op.name}' cannot join a map with a tensor that has no image axes")
    if len({maps.axes[v] for v in values}) > 1 or len({maps.extent(v) for v in values}) > 1:
        raise Refusal(f"'{op.name}' cannot join maps whose image axes differ")
    h, w = maps.axes[values[0]]
    if op.name == "stack":
        h, w = h + (dim <= h), w + (dim <= w)
    local = Local(op, {v: maps.pointwise(v) for v in values}, ((h, w),), replay(op))
    return [*made, local] if made else local


def _end_to_end(op: Op, maps: Maps, values: list[int], dim: int) -> list[Node]:
    """Maps (and vectors with rows of their own) joined along an image axis: each is padded by the length of the others.

    Rows of the second map wait as halos until the first map is complete, so the last tiles do most of the work.
    """
    axes = next(maps.axes[v] for v in values if v in maps)
    rank, nodes = len(maps.shape(op.outputs[0])), []
    total = [maps.shape(op.outputs[0])[axis] for axis in axes]
    reads: dict[int, tuple[Access, Access]] = {}
    offset = 0
    for value in values:
        shape = maps.shape(value)
        part = replace(op, args=(), kwargs={}, inputs=(value,))
        if value not in maps:
            part, made = promoted(part, maps, axes, rank, size=(shape[axes[0]], shape[axes[1]]))
            nodes.extend(made)
        elif value in reads:  # a second time: under a new value number
            made, number = mapped(part, maps, "twin", (value,), lambda x: x)
            part = replace(part, inputs=(number,))
            nodes.append(made)
        (own,) = part.inputs
        if own not in maps or maps.axes[own] != axes:
            raise Refusal(f"'{op.name}' cannot join maps whose image axes differ")
        both = list(maps.pointwise(own))
        both[axes.index(dim)] = Window(shape[dim], total[axes.index(dim)], pad=offset)
        reads[own] = both[0], both[1]
        offset += shape[dim]
    parts = tuple(reads)

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (torch.cat([env[v] for v in parts], dim),)

    return [*nodes, Local(replace(op, name="end_to_end", args=(), kwargs={}, inputs=parts), reads, (axes,), run)]


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
        spatial, mode, ahead = (before[h], after[h], before[w], after[w]), given["mode"], list[Node]()
        if (h, w) == (3, 4) and rank == 5 and before[2] + after[2] > 0:  # the depth first
            ahead, value = padded_depth(op, maps, value, (before[2], after[2]), mode)
            before[2] = after[2] = 0
        if value in maps.flat or sum(spatial) != sum(before) + sum(after) or min(given["pad"]) < 0:
            raise Refusal(f"padding with mode='{mode}' must be non-negative and along the image axes only")
        if mode == "circular":
            return [*ahead, *circular_pad(op, maps, value, spatial)]
        return [*ahead, mirrored_pad(replace(op, inputs=(value,)), maps, value, spatial, mode)]
    if value in maps.flat:
        if before[h] or after[h]:
            raise Refusal("'pad' cannot pad the positions of a flattened map")
        return _local(op, maps, value, (h, w))
    out = maps.shape(op.outputs[0])
    size = maps.size(value)
    reads = {value: (Window(size[0], out[h], pad=before[h]), Window(size[1], out[w], pad=before[w]))}
    fill = given["value"] or 0.0
    if isinstance(fill, Ref):
        raise Refusal("cannot pad with a computed value; use a number")

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        first, last = list(before), list(after)
        first[h], last[h], first[w], last[w] = block.pad
        amounts = [n for d in reversed(range(rank)) for n in (first[d], last[d])]
        return (F.pad(env[value], amounts, value=fill),)

    return Local(op, reads, ((h, w),), run)


@rule("unfold")
def unfold(op: Op, maps: Maps) -> Local:
    """`Tensor.unfold`: windows of one axis as a new dimension. `F.unfold`: windows of a map as columns."""
    value = op.inputs[0]
    if op.func is F.unfold:
        return _columns(op, maps, value)
    given = arguments(op, "input dimension size step")
    shape, axes = maps.shape(value), maps.axes[value]
    dim, size, step = given["dimension"] % len(shape), given["size"], given["step"]
    if value in maps.flat:
        raise Refusal("'unfold' of a flattened map is not supported; call it before flattening")
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
