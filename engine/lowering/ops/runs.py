"""Rule of `column_runs`: a run of columns of each row, with a start for each row (../relative_positions.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...capture.program import Op
from ..geometry import Gather, same
from .base import Block, Env, Local, Maps, Refusal, rule


def column_runs(x: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """(..., rows, columns) -> (..., rows, length): columns starts[i] .. starts[i] + length - 1 of row i."""
    first = torch.tensor(starts, device=x.device)
    indices = first[:, None] + torch.arange(length, device=x.device)
    return x.gather(-1, indices.expand(*x.shape[:-1], length))


def is_per_position(maps: Maps, value: int) -> bool:
    """Whether the last two dimensions of a map are a row of columns for each position, or a matrix for each."""
    if value not in maps:
        return False
    rank, axes = len(maps.shape(value)), maps.axes[value]
    return rank - 1 not in axes and not (rank - 2 in axes and value in maps.flat)


@rule("column_runs")
def runs(op: Op, maps: Maps) -> Local:
    """Per position; if rows are positions, a block uses the starts of its own rows."""
    value = op.inputs[0]
    rank, axes = len(maps.shape(value)), maps.axes[value]
    if not is_per_position(maps, value):
        raise Refusal("cannot select columns of a matrix that are positions of the image")
    given = op.func.keywords  # pyright: ignore[reportFunctionMemberAccess]
    starts, length = given["starts"], given["length"]
    # A gather along rows with their own starts: blocks at other positions differ.
    reads = [
        Gather(n, n, tuple(range(n))) if axis == rank - 2 else same(n)
        for n, axis in zip(maps.size(value), axes, strict=True)
    ]

    def run(env: Env, block: Block) -> tuple[Tensor, ...]:
        own = starts
        for axis, (low, high) in zip(axes, (block.rows, block.cols), strict=True):
            if axis == rank - 2:
                own = starts[low:high]
        return (column_runs(env[value], own, length),)

    return Local(op, {value: (reads[0], reads[1])}, (axes,), run)
