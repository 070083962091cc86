"""Ops on smalls whose result has a value for each position of the image: maps again, made block by block.

    interpolate   (N, C, 6, 6) -> (N, C, H, W)                 pyramid pooling
    expand        (N, C, H, 1) -> (N, C, H, W)                 strip pooling
    a + b, a @ b  (N, C, H, 1), (N, C, 1, W) -> (N, C, H, W)   coordinate attention

What they read is resident (promote.py). Of other smalls of the image's size nothing is assumed: they are there whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..trace import Op
from .base import RULES, Env, Local, Maps, Node, Refusal, find_rule
from .pointwise import ELEMENTWISE
from .promote import over_resident, renamed, resident, spread_strip

_RESAMPLES = frozenset({"interpolate", "upsample", "upsample_nearest", "upsample_bilinear"})
_SPREADS = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "tile"})
_PRODUCTS = frozenset({"matmul", "__matmul__"})


def rise(op: Op, maps: Maps) -> list[Node] | None:
    """The nodes of an op on smalls whose output is a map; None if it stays a small."""
    if len(op.outputs) != 1 or op.mutated or op.autocast is not None:
        return None
    output = op.outputs[0]
    shape = tuple(maps.shape(output))
    if len(shape) != 4 or 1 in shape[2:] or shape[2:] not in {maps.size(v) for v in maps.axes}:
        return None
    inputs = {v: tuple(maps.shape(v)) for v in op.inputs}
    if not inputs or any(len(given) > 4 or given[-2:] == shape[2:] for given in inputs.values()):
        return None
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
    nodes, there = resident(maps, value, (2, 3))
    rule = find_rule(op.name)
    assert rule is not None
    made = rule(renamed(op, {value: there}), maps)
    return [*nodes, made] if isinstance(made, Local) else None
