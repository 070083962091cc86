"""Replaces stored maps that copies and sums make from smaller maps: the smaller ones are stored instead.

    (N, H, W, 1, W) -> expand -> (N, H, W, H, W) + (N, H, W, H, W) -> (N, H, W, H * W)

A bias for each pair of positions is as large as all attention scores. Its source has a row and a column for each
position, and broadcasting it again tile by tile is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..capture.program import Op
from .ops import Local, Maps, Node

_COPIES = frozenset(
    "expand expand_as broadcast_to permute transpose swapaxes reshape view flatten unflatten unsqueeze squeeze".split()
)
_SUMS = frozenset({"add", "__add__", "add_", "__iadd__"})


def before_spreading(maps: Maps, nodes: Sequence[Node | Op], values: Sequence[int]) -> list[int]:
    """The values in program order; maps of at most half the size replace each value that they make."""
    makers = {v: node for node in nodes if isinstance(node, Local) for v in node.op.outputs}
    replaced = {one for value in values for one in _smallest(maps, makers, value)}
    return [v for v in makers if v in replaced]


def _smallest(maps: Maps, makers: Mapping[int, Local], value: int) -> list[int]:
    """The maps with the fewest elements in total that make a map; itself unless they have at most half as many."""
    best, front = [value], [value]
    while True:
        spread = [v for v in front if v in makers and _is_cheap(maps, makers[v])]
        if not spread:
            return best
        largest = max(spread, key=lambda v: _elements(maps, [v]))
        front = list(dict.fromkeys([*(v for v in front if v != largest), *makers[largest].reads]))
        if 2 * _elements(maps, front) <= _elements(maps, best):
            best = front


def _elements(maps: Maps, values: Sequence[int]) -> int:
    return sum(math.prod(maps.shape(v)) for v in values)


def _is_cheap(maps: Maps, local: Local) -> bool:
    """Whether a local op copies or adds maps, position by position."""
    name = local.op.name.removeprefix("flat_")
    inside = all(both == maps.pointwise(v) for v, both in local.reads.items())
    return inside and (name in _COPIES or (name in _SUMS and set(local.op.inputs) <= set(local.reads)))
