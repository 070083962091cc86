"""Rules of reshapes: both image axes remain, or become one, or are cut into blocks of neighbouring rows.

    (N, C, H, W)          -> (N, g, C/g, H, W)          per pixel
    (N, C, H, W)          -> (N, C, H*W), (N*H*W, C)     a flattened map, see flat.py
    (N, C, H, W)          -> (N, C, H/r, r, W/r, r)      a window of r with stride r; the inverse is a gather

Anything else needs the assembled map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...capture.program import Op
from ..geometry import Access, Gather, Window, same
from .base import Block, Env, Flat, Local, Maps, Refusal, VectorOp, Whole, rule


def position_of(before: Sequence[int], after: Sequence[int], axis: int, took: int, sizes: Sequence[int]) -> int | None:
    """Position in shape `after` of `took` dimensions of shape `before` from `axis` on, with these new sizes."""
    ahead, behind = math.prod(before[:axis]), math.prod(before[axis + took :])
    for position in range(len(after) - len(sizes) + 1):
        if (
            list(after[position : position + len(sizes)]) == list(sizes)
            and math.prod(after[:position]) == ahead
            and math.prod(after[position + len(sizes) :]) == behind
        ):
            return position
    return None


@rule("reshape", "view", "reshape_as", "view_as", "flatten", "unflatten")
def reshape(op: Op, maps: Maps) -> Local | VectorOp | Whole:
    value = op.inputs[0]
    if value not in maps:  # a tensor in the shape of a map
        shape = maps.shape(op.outputs[0])
        return VectorOp(lambda env: (env[value].reshape(shape),), (value,), op.outputs)
    before, after = maps.shape(value), maps.shape(op.outputs[0])
    if maps.program.values[value].dtype != maps.program.values[op.outputs[0]].dtype:
        raise Refusal("'view' cannot reinterpret the bytes of a map as another dtype")
    if value in maps.flat:
        return _of_flat(op, maps, value, before, after) or Whole(op)
    h, w = maps.axes[value]
    found = _both(before, after, h, w)
    if found is None:
        return (_flattens(op, maps, value, before, after) if w == h + 1 else None) or Whole(op)
    (new_h, rows, high), (new_w, cols, wide) = found

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        x = env[value]
        shape = list(after)
        for new, old, access, scale in ((new_h, h, rows, high), (new_w, w, cols, wide)):
            shape[new] = x.shape[old] * scale if isinstance(access, Gather) else x.shape[old] // scale
        x = x.reshape(shape)
        for new, access, scale, (lo, hi) in ((new_h, rows, high, block.rows), (new_w, cols, wide, block.cols)):
            if isinstance(access, Gather):
                x = x.narrow(new, lo % scale, hi - lo)
        return (x,)

    return Local(op, {value: (rows, cols)}, ((new_h, new_w),), run)


_Move = tuple[int, Access, int]  # new position of an axis, access of its new indices to the old ones, size factor


def _both(before: Sequence[int], after: Sequence[int], h: int, w: int) -> tuple[_Move, _Move] | None:
    """How both image axes moved. An axis of one block, (B, 7, 14, C) -> (B, 1, 7, 2, 7, C), is cut like the other."""
    pairs = [
        (first, second)
        for first in _along(before, after, h)
        for second in _along(before, after, w)
        if first[0] != second[0]
    ]
    alike = (
        pair
        for pair in pairs
        if type(pair[0][1]) is type(pair[1][1]) and _is_unchanged(pair[0]) == _is_unchanged(pair[1])
    )
    return next(alike, next(iter(pairs), None))


def _is_unchanged(move: _Move) -> bool:
    return isinstance(move[1], Window) and move[1] == same(move[1].size_in)


def _along(before: Sequence[int], after: Sequence[int], axis: int) -> list[_Move]:
    """Possible moves of an image axis: unchanged, cut into blocks, or joined with the dimension after it."""
    size = before[axis]
    found: list[_Move] = []
    position = position_of(before, after, axis, 1, [size])
    if position is not None:
        found.append((position, same(size), 1))
    for blocks in after:
        if 0 < blocks < size and size % blocks == 0:
            position = position_of(before, after, axis, 1, [blocks, size // blocks])
            if position is not None:
                found.append((position, Window(size, blocks, size // blocks, size // blocks), size // blocks))
    if axis + 1 < len(before):
        factor = before[axis + 1]
        position = position_of(before, after, axis, 2, [size * factor])
        if position is not None:
            access = Gather(size, size * factor, tuple(o // factor for o in range(size * factor)))
            found.append((position, access, factor))
    return found


def _merged(
    before: Sequence[int], after: Sequence[int], ahead: int, height: int, width: int
) -> tuple[int, Flat] | None:
    """The dimension of `after` with all pixels after `ahead` elements and as few other factors as possible."""
    pixels = height * width
    behind = math.prod(before) // (ahead * pixels)
    found: list[tuple[int, Flat]] = []
    for position, size in enumerate(after):
        first, last = math.prod(after[:position]), math.prod(after[position + 1 :])
        if ahead % first == 0 and behind % last == 0:
            flat = Flat(height, width, ahead // first, behind // last)
            if flat.ahead * pixels * flat.behind == size:
                found.append((position, flat))
    return min(found, key=lambda one: one[1].ahead * one[1].behind, default=None)


def _flattens(op: Op, maps: Maps, value: int, before: Sequence[int], after: Sequence[int]) -> Local | None:
    """A reshape of both image axes into one, alone or together with neighbouring dimensions; None if it does not."""
    h = maps.axes[value][0]
    height, width = maps.size(value)
    found = _merged(before, after, math.prod(before[:h]), height, width)
    if found is None:
        return None
    position, flat = found

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        x = env[value]
        shape = list(after)
        shape[position] = flat.ahead * x.shape[h] * x.shape[h + 1] * flat.behind
        return (x.reshape(shape),)

    maps.flat[op.outputs[0]] = flat
    return Local(op, {value: maps.pointwise(value)}, ((position, position),), run)


def _of_flat(op: Op, maps: Maps, value: int, before: Sequence[int], after: Sequence[int]) -> Local | None:
    """A reshape of a flattened map that remains flattened or restores both axes; None for others."""
    axis, own = maps.axes[value][0], maps.flat[value]
    ahead = math.prod(before[:axis]) * own.ahead
    behind = math.prod(before[axis + 1 :]) * own.behind
    positions = range(len(after) - 2, -1, -1)  # from the end: the first dimensions are images, possibly one
    prefix_unchanged = before[: axis + 1] == after[: axis + 1]  # a dimension of size one must not be taken for the rows
    position = next(
        (
            i
            for i in positions
            if not (prefix_unchanged and i < axis)
            and tuple(after[i : i + 2]) == (own.height, own.width)
            and (math.prod(after[:i]), math.prod(after[i + 2 :])) == (ahead, behind)
        ),
        None,
    )
    if position is not None:
        flat, axes = own, (position, position + 1)
    else:
        found = _merged(before, after, ahead, own.height, own.width)
        if found is None:
            return None
        position, flat = found
        maps.flat[op.outputs[0]] = flat
        axes = (position, position)

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        shape = list(after)
        if axes[0] == axes[1]:
            shape[position] = env[value].shape[axis] // (own.ahead * own.behind) * flat.ahead * flat.behind
        else:
            shape[position : position + 2] = block.size
        return (env[value].reshape(shape),)

    return Local(op, {value: maps.pointwise(value)}, (axes,), run)
