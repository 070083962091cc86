"""Rules of reductions to a grid of cells: adaptive pooling, and reductions over one of the image axes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...capture.program import Op, Ref
from ..geometry import Cells, Window
from .base import RULES, Block, Env, Local, Maps, Node, Reduction, Refusal, VectorOp, Whole, need_nchw, rule

Grid = tuple[Cells, Cells]

# Larger grids are maps: pooled by windows if the sizes divide.
_LARGEST = 32


def strip_grid(maps: Maps, value: int, dims: set[int]) -> Grid | None:
    """The cells of a reduction over one of the image axes; None for a reduction over both."""
    axes = maps.axes[value]
    if set(axes) <= dims:
        return None
    height, width = (
        Cells(size, 1 if axis in dims else size) for axis, size in zip(axes, maps.size(value), strict=True)
    )
    return height, width


def is_read(maps: Maps, value: int) -> bool:
    """Whether an op reads a value, or the network returns it."""
    return any(value in op.inputs for op in maps.program.ops) or value in maps.program.results()


@rule("adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_max_pool2d_with_indices")
def adaptive_pool2d(op: Op, maps: Maps) -> Local | Reduction | Whole | list[Node]:
    value = op.inputs[0]
    need_nchw(op, maps, value)
    if any(is_read(maps, other) for other in op.outputs[1:]):
        return Whole(op)
    size, count = maps.size(value), (maps.shape(op.outputs[0])[2], maps.shape(op.outputs[0])[3])
    first_only = "max" in op.name
    if count == (1, 1):
        kind, pixels = ("max", 1) if first_only else ("sum", math.prod(size))
        return Reduction(op, value, kind, pixels, (2, 3), True, first_only=first_only)
    rows, cols = (Cells(n, cells) for n, cells in zip(size, count, strict=True))
    fine = not (rows.every or cols.every) and math.prod(count) > _LARGEST**2
    if rows.every == cols.every and (fine or rows.every):
        if size[0] % count[0] == size[1] % count[1] == 0:
            return _windows(op, maps, value, first_only)
        if first_only:
            return Whole(op)
    if first_only:
        return Reduction(op, value, "max", 1, (2, 3), True, first_only=True, grid=(rows, cols))
    return _means(op, maps, value, (rows, cols))


@rule("adaptive_avg_pool1d")
def adaptive_avg_pool1d(op: Op, maps: Maps) -> Any:
    """The mean of all positions, (N, C, L) -> (N, C, 1); finer cuts of flattened positions are refused."""
    if maps.shape(op.outputs[0])[-1] != 1:
        raise Refusal("'adaptive_avg_pool1d' cannot cut flattened positions into cells; use adaptive_avg_pool2d")
    mean = replace(op, func=torch.mean, name="mean", args=(Ref(op.inputs[0]), -1, True), kwargs={})
    return RULES["mean"](mean, maps)


def _windows(op: Op, maps: Maps, value: int, largest: bool) -> Local:
    """Cells of equal size that do not overlap."""
    kernel = tuple(n // cells for n, cells in zip(maps.size(value), maps.shape(op.outputs[0])[2:], strict=True))
    rows, cols = (Window(n, n // k, k, k) for n, k in zip(maps.size(value), kernel, strict=True))
    pool = F.max_pool2d if largest else F.avg_pool2d

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (pool(env[value], kernel),)

    return Local(replace(op, outputs=op.outputs[:1], autocast=None), {value: (rows, cols)}, ((2, 3),), run)


def _means(op: Op, maps: Maps, value: int, grid: Grid) -> list[Node]:
    """Means of cells: sums divided by the number of pixels."""

    info = maps.program.values[op.outputs[0]]
    own = torch.promote_types(info.dtype, torch.float32)
    total = maps.new_value(dtype=own, like=op.outputs[0])
    high, wide = ([end - start for start, end in map(cells.span, range(cells.count))] for cells in grid)

    def divide(env: Env) -> tuple[Tensor, ...]:
        sums = env[total]
        pixels = sums.new_tensor(high)[:, None] * sums.new_tensor(wide)
        return ((sums / pixels).to(info.dtype),)

    reduction = Reduction(op, value, "sum", 1, (2, 3), True, outputs=(total,), grid=grid)
    return [reduction, VectorOp(divide, (total,), op.outputs[:1])]
