"""Padding with values of the image: a mirrored border, the last pixel repeated, or circular.

Joining a map to its own mirror image is such a padding, as in `torch.cat([x, x.flip(2)], 2)[:, :, :height]`.

Circular padding has the last rows before the first, and the first after the last; likewise for columns. The rows and
columns at the ends of the map become vectors, so later ops wait for them as for any reduction. Everything else is read
through a window.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...capture.program import Op, Ref
from ..geometry import Mirror, Window
from .base import Block, Env, Local, Maps, Node, Whole, part_of
from .constants import Constants
from .resample import select


def mirrored_pad(op: Op, maps: Maps, value: int, pad: tuple[int, int, int, int], mode: str) -> Local:
    """`F.pad` with a mode of `Mirror`; `pad` is (top, bottom, left, right)."""
    h, w = maps.axes[value]
    height, width = maps.size(value)
    rows = Mirror(height, height + pad[0] + pad[1], pad[0], mode)
    cols = Mirror(width, width + pad[2] + pad[3], pad[2], mode)

    constants = Constants()

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        return (_take(_take(env[value], h, rows, block.rows, constants), w, cols, block.cols, constants),)

    return Local(op, {value: (rows, cols)}, (maps.axes[value],), run)


def padded_depth(op: Op, maps: Maps, value: int, amounts: tuple[int, int], mode: str) -> tuple[list[Node], int]:
    """The nodes that pad the depth of a volume, and their result."""
    n, c, depth, *size = maps.shape(value)
    longer = maps.new_map((3, 4), (n, c, depth + sum(amounts), *size), like=value)

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (F.pad(env[value], [0, 0, 0, 0, *amounts], mode=mode),)

    return [Local(part_of(op, "depth", (value,), (longer,)), {value: maps.pointwise(value)}, ((3, 4),), run)], longer


def joined_mirror(op: Op, maps: Maps, value: int, dim: int, length: int) -> Local:
    """The first `length` rows or columns of a map that is joined to its mirror image."""
    axes = maps.axes[value]
    more = [length - maps.shape(value)[axis] if axis == dim else 0 for axis in axes]
    return mirrored_pad(replace(op, inputs=(value,)), maps, value, (0, more[0], 0, more[1]), "symmetric")


def _take(x: Tensor, dim: int, access: Mirror, span: tuple[int, int], constants: Constants) -> Tensor:
    """The outputs of `span`, selected from the window with their inputs."""
    start = access.span(*span)[0]
    sources = [access.source(o) - start for o in range(*span)]
    if sources == list(range(sources[0], sources[0] + len(sources))):
        return x.narrow(dim, sources[0], len(sources))
    return select(x, dim, constants.numbers(sources, x))


def circular_pad(op: Op, maps: Maps, value: int, pad: tuple[int, int, int, int]) -> list[Node]:
    """`F.pad` with mode "circular"; `pad` is (top, bottom, left, right), none of them negative."""
    h, w = maps.axes[value]
    height, width = maps.size(value)
    top, bottom, left, right = pad
    nodes: list[Node] = []

    def end(dim: int, start: int, length: int) -> int | None:
        if not length:
            return None
        made, strip = _strip(op, maps, value, dim, start, length)
        nodes.extend(made)
        return strip

    above, below = end(h, height - top, top), end(h, 0, bottom)
    before, behind = end(w, width - left, left), end(w, 0, right)

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        (r0, r1), (c0, c1) = block.rows, block.cols
        inner = slice(max(r0 - top, 0), min(r1 - top, height))
        x = env[value]
        # Rows of the map are extended first; rows beyond its ends cover all columns.
        if inner.start < inner.stop:
            parts = [
                _columns(env, before, w, c0, min(c1, left)).narrow(h, inner.start, inner.stop - inner.start)
                if c0 < left
                else None,
                x if max(c0, left) < min(c1, left + width) else None,
                _columns(env, behind, w, max(c0 - left - width, 0), c1 - left - width).narrow(
                    h, inner.start, inner.stop - inner.start
                )
                if c1 > left + width
                else None,
            ]
            x = _joined(parts, w)
        columns = torch.arange(c0 - left, c1 - left, device=x.device) % width
        first = _columns(env, above, h, r0, min(r1, top)).index_select(w, columns) if r0 < top else None
        start = max(r0 - top - height, 0)
        last = _columns(env, below, h, start, r1 - top - height).index_select(w, columns) if r1 > top + height else None
        return (_joined([first, x if inner.start < inner.stop else None, last], h),)

    vectors = tuple(v for v in (above, below, before, behind) if v is not None)
    own = part_of(op, "circular", (value, *vectors), op.outputs)
    reads = Window(height, height + top + bottom, pad=top), Window(width, width + left + right, pad=left)
    return [*nodes, Local(own, {value: reads}, ((h, w),), run)]


def _strip(op: Op, maps: Maps, value: int, dim: int, start: int, length: int) -> tuple[list[Node], int]:
    """The nodes that copy some rows or columns of a map into a vector, and that vector."""
    shape = list(maps.shape(value))
    shape[dim] = length
    cropped, strip = maps.new_value(shape, like=value), maps.new_value(shape, like=value)
    axes = maps.axes[value]
    reads = [*maps.pointwise(value)]
    reads[axes.index(dim)] = Window(maps.shape(value)[dim], length, pad=-start)
    crop = part_of(op, "crop", (value,), (cropped,))
    # `clone`, because a view would retain the memory of the whole tile.
    local = Local(crop, {value: (reads[0], reads[1])}, (axes,), lambda env, _block: (env[value].clone(),))
    return [local, Whole(Op(torch.clone, "clone", (Ref(cropped),), {}, (cropped,), (strip,), (), op.module))], strip


def _columns(env: Env, strip: int | None, dim: int, start: int, end: int) -> Tensor:
    assert strip is not None
    return env[strip].narrow(dim, start, end - start)


def _joined(parts: list[Tensor | None], dim: int) -> Tensor:
    present = [part for part in parts if part is not None]
    return present[0] if len(present) == 1 else torch.cat(present, dim)
