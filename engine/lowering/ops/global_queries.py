"""Global queries (GCViT): all windows of an image are multiplied by the same positions of another map.

    (N*windows, heads, positions, d) @ (N*windows, heads, d, pixels of the window)

The left factor repeats the queries of each image for each of its windows. They are stored once per image, as a vector,
and each tile repeats them for its own windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...capture.program import Op
from .attention import take_whole
from .base import Block, Env, Local, Maps, Node, Refusal, arguments
from .promote import renamed

# Ops that compute each row by itself, if their other inputs are the same for all rows.
_EACH_ROW = {
    "linear",
    "add",
    "sub",
    "reshape",
    "view",
    "flatten",
    "permute",
    "transpose",
    "contiguous",
    "mul",
    "div",
    "to",
    "float",
}


def once_for_each_image(op: Op, maps: Maps, queries: int, windows: int) -> tuple[Op, list[Node]]:
    """The op with `queries`, which are the same for all windows of an image, as a map over the windows.

    Raises:
        Refusal: if queries differ between windows, or the first dimension contains more than images and windows.
    """
    flat, rows = maps.flat.get(windows), maps.shape(queries)[0]
    times = _repeated(maps, queries)
    if flat is None or maps.axes[windows] != (0, 0) or flat.behind > 1 or times is None or flat.ahead * times != rows:
        raise Refusal(f"'{op.name}' cannot multiply windows by positions of another map that differ between windows")
    images = flat.ahead
    first = maps.new_value((images, *maps.shape(queries)[1:]), like=queries)
    maps.axes[first] = maps.axes[queries]
    if queries in maps.flat:
        maps.flat[first] = maps.flat[queries]

    def take(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (env[queries].unflatten(0, (images, times))[:, 0],)

    taken = Op(torch.select, "once", (), {}, (queries,), (first,), (), op.module, line=op.line)
    local = Local(taken, {queries: maps.pointwise(queries)}, (maps.axes[queries],), take)
    alone, nodes = take_whole(replace(op, args=(), kwargs={}, inputs=(first,)), maps, (first,))
    (vector,) = alone.inputs
    spread = maps.new_value(like=queries)
    maps.axes[spread], maps.flat[spread] = (0, 0), flat

    def repeat(env: Env, block: Block) -> tuple[Tensor, ...]:
        count = (block.rows[1] - block.rows[0]) * (block.cols[1] - block.cols[0])
        return (env[vector].repeat_interleave(count, 0),)

    own = Op(torch.repeat_interleave, "spread", (), {}, (windows, vector), (spread,), (), op.module, line=op.line)
    made = Local(own, {windows: maps.pointwise(windows)}, ((0, 0),), repeat)
    return renamed(op, {queries: spread}), [local, *nodes, made]


def _repeated(maps: Maps, value: int) -> int | None:
    """How often a value repeats the part of each image; None if no repetition made it."""
    while True:
        maker = next((op for op in maps.program.ops if value in op.outputs), None)
        if maker is None or not maker.inputs:
            return None
        value = maker.inputs[0]
        before, after = maps.shape(value), maps.shape(maker.outputs[0])
        if maker.name == "repeat_interleave":
            given = arguments(maker, "input repeats dim", dim=None)
            return given["repeats"] if given["dim"] == 0 and isinstance(given["repeats"], int) else None
        if maker.name == "repeat" and before[0] == 1 and after[1:] == before[-len(after) + 1 :]:
            return after[0]
        others = [maps.shape(v) for v in maker.inputs[1:]]
        alike = all(len(shape) < len(after) or shape[0] == 1 for shape in others) and before[0] == after[0]
        if maker.name not in _EACH_ROW or not alike or _moves_rows(maker, len(before)):
            return None


def _moves_rows(op: Op, rank: int) -> bool:
    """Whether a permutation moves the first dimension."""
    if op.name not in ("permute", "transpose"):
        return False
    given = [*op.args[1:], *op.kwargs.values()]
    dims = [d % rank for one in given for d in (one if isinstance(one, Sequence) else [one])]
    return dims[0] != 0 if op.name == "permute" else 0 in dims
