"""Pooling along the positions of a flattened map in row-major order (NextViT's keys): sums of runs of positions.

A run of k positions is part of a row, or several rows and parts of two. All runs are few values, so each tile adds its
part of every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...capture.program import Op
from ..geometry import Gather
from .base import Block, Env, Local, Maps, Node, Reduction, Refusal, arguments, replay, rule
from .reductions import vector, wide


def _one(value: object) -> object:
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


@rule("avg_pool1d")
def avg_pool1d(op: Op, maps: Maps) -> Local | list[Node]:
    """Along the positions: runs that do not overlap. Along another dimension: per pixel."""
    given = arguments(
        op,
        "input kernel_size stride padding ceil_mode count_include_pad",
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
    )
    value, length = given["input"].value, _one(given["kernel_size"])
    rank, axes = len(maps.shape(value)), maps.axes[value]
    if rank - 1 not in axes:
        return Local(op, {value: maps.pointwise(value)}, (axes,), replay(op))
    stride = _one(given["stride"]) or length
    if value not in maps.flat or maps.merged(value):
        raise Refusal("'avg_pool1d' cannot run along one image axis; use avg_pool2d")
    if stride != length or _one(given["padding"]) != 0 or given["ceil_mode"]:
        raise Refusal("'avg_pool1d' along positions of the image must have no padding and no overlapping windows")
    assert isinstance(length, int)
    return _of_runs(op, maps, value, length)


def _of_runs(op: Op, maps: Maps, value: int, length: int) -> list[Node]:
    """The nodes of a pooling: a channel with the run of each position, the sums of runs, and their means."""
    height, width = maps.size(value)
    *batch, channels, positions = maps.shape(value)
    runs, dtype = positions // length, maps.program.values[op.outputs[0]].dtype
    own = wide(maps.program.values[value].dtype)
    if runs + 1 > 1 / torch.finfo(own).eps:
        raise Refusal(f"'avg_pool1d' makes more than {runs} runs of positions, too many to be numbered in {own}")
    with_runs = maps.new_value((*batch, channels + 1, positions), own, like=value)
    maps.axes[with_runs], maps.flat[with_runs] = maps.axes[value], maps.flat[value]

    def append_runs(env: Env, block: Block) -> tuple[Tensor, ...]:
        x = env[value].to(own)
        rows, cols = (torch.arange(*span, device=x.device) for span in (block.rows, block.cols))
        run = torch.div((rows[:, None] * width + cols).flatten(), length, rounding_mode="floor")
        return (torch.cat([x, run.to(own).expand(*x.shape[:-2], 1, -1)], -2),)

    def sums(block: Tensor) -> Tensor:
        x = block.flatten(-2)
        run = x[..., -1, :].detach().reshape(-1, x.shape[-1])[0].long()
        total = x.new_zeros(*x.shape[:-2], channels, runs + 1)  # the last run is incomplete
        return total.index_add(-1, run, x[..., :-1, :])[..., :runs]

    # Gathers, though each position reads itself: the values of a block depend on its position.
    reads = Gather(height, height, tuple(range(height))), Gather(width, width, tuple(range(width)))
    named = Op(op.func, "runs", (), {}, (value,), (with_runs,), (), op.module, line=op.line)
    total = maps.new_value(dtype=own, like=op.outputs[0])
    return [
        Local(named, {value: reads}, (maps.axes[with_runs],), append_runs),
        Reduction(op, with_runs, "sum", 1, (), True, outputs=(total,), form=sums),
        vector((total,), op.outputs[0], lambda t: (t / length).to(dtype)),
    ]
