"""Rules of ops on vectors whose result has a value for each image position: maps that are made block by block.

    interpolate   (N, C, 6, 6) -> (N, C, H, W)                 pyramid pooling
    expand        (N, C, H, 1) -> (N, C, H, W)                 strip pooling
    a + b, a @ b  (N, C, H, 1), (N, C, 1, W) -> (N, C, H, W)   coordinate attention

Their inputs are resident (promote.py). Other vectors of the image's size are computed whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...capture.program import Op
from .base import Env, Local, Maps, Node, Refusal, find_rule
from .pointwise import ELEMENTWISE
from .promote import over_resident, renamed, resident, spread_strip

_RESAMPLES = frozenset({"interpolate", "upsample", "upsample_nearest", "upsample_bilinear"})
_SPREADS = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "tile"})
_PRODUCTS = frozenset({"matmul", "__matmul__"})


def rise(op: Op, maps: Maps) -> list[Node] | None:
    """The nodes of an op on vectors whose output is a map; None if it stays a vector."""
    if len(op.outputs) != 1 or op.mutated or op.autocast is not None:
        return None
    output = op.outputs[0]
    shape = tuple(maps.shape(output))
    if len(shape) != 4 or 1 in shape[2:] or shape[2:] not in {maps.size(v) for v in maps.axes}:
        return None
    inputs = {v: tuple(maps.shape(v)) for v in op.inputs}
    if any(len(given) > 4 or given[-2:] == shape[2:] for given in inputs.values()):
        return None
    if all(given[-2:] in ((), (1,), (1, 1)) for given in inputs.values()):
        return None  # `promoted` spreads one value for all positions where it meets a map
    try:
        if op.name in _RESAMPLES:
            return _resampled(op, maps)
        if op.name in _SPREADS:
            return _repeated(op, maps)
        if op.name in _PRODUCTS:
            return _product(op, maps)
        return _broadcast(op, maps) if op.name in ELEMENTWISE else None
    except Refusal:
        return None


def _resampled(op: Op, maps: Maps) -> list[Node] | None:
    value = op.inputs[0]
    if len(maps.shape(value)) != 4:
        return None
    nodes, resident_value = resident(maps, value, (2, 3))
    rule = find_rule(op.name)
    assert rule is not None
    made = rule(renamed(op, {value: resident_value}), maps)
    return [*nodes, made] if isinstance(made, Local) else None


def _repeated(op: Op, maps: Maps) -> list[Node] | None:
    value, output = op.inputs[0], op.outputs[0]
    own, full = tuple(maps.shape(value)), tuple(maps.shape(output))
    own = (1,) * (4 - len(own)) + own
    target = (*own[:2], *full[2:]) if op.name in ("repeat", "tile") else full
    if target != full or any(size not in (1, whole) for size, whole in zip(own, full, strict=True)):
        return None
    nodes, _ = spread_strip(op, maps, value, own, (2, 3), (full[2], full[3]), output)
    return nodes


def _broadcast(op: Op, maps: Maps) -> list[Node] | None:
    size = maps.shape(op.outputs[0])[-2], maps.shape(op.outputs[0])[-1]
    nodes: list[Node] = []
    names: dict[int, int] = {}
    for value in dict.fromkeys(op.inputs):
        shape = [1] * (4 - len(maps.shape(value))) + list(maps.shape(value))
        if shape[2:] != [1, 1]:
            made, names[value] = spread_strip(op, maps, value, shape, (2, 3), size)
            nodes.extend(made)
    rule = find_rule(op.name)
    assert rule is not None
    made = rule(renamed(op, names), maps)
    return [*nodes, *(made if isinstance(made, list) else [made])]


def _product(op: Op, maps: Maps) -> list[Node] | None:
    """An outer product, (N, C, H, 1) @ (N, C, 1, W)."""
    left, right = op.inputs if len(op.inputs) == 2 else (op.inputs[0],) * 2
    if maps.shape(left)[-1] != 1 or len(maps.shape(left)) != 4 or len(maps.shape(right)) != 4:
        return None
    output = op.outputs[0]
    size = maps.shape(output)[2], maps.shape(output)[3]
    nodes, rows = resident(maps, left, (2, 3))
    more, cols = resident(maps, right, (2, 3))

    def run(env: Env, _block: object) -> tuple[Tensor, ...]:
        return (env[rows] * env[cols],)

    own = Op(torch.mul, "outer_product", (), {}, (rows, cols), (output,), (), op.module, line=op.line)
    return [*nodes, *more, Local(own, {v: over_resident(maps, v, size) for v in (rows, cols)}, ((2, 3),), run)]
