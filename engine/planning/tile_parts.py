"""Cuts of a one-stage training step, so that a tile runs through one part of the network at a time.

A tile of one stage holds the saved tensors of all layers, and all folded weights and their copies. Divided into parts,
with stored maps in between, it holds those of one part only. Early layers make the largest maps, late layers have the
most weights; parts have about equal shares of their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from ..capture.program import Op
from ..lowering.ops import Local, Maps, Node
from .interstage import value_bytes

_PARTS = (2, 3, 4, 6, 9, 13, 20)


def cuts_by_outputs(maps: Maps, nodes: Sequence[Node | Op]) -> Iterator[list[int]]:
    """Lists of maps to cut at, for smaller and smaller parts; each cut is where it stores few bytes."""
    order = [node for node in nodes if isinstance(node, Local)]
    alive, ends = _alive(maps, order), list(accumulate(_shares(maps, order)))
    last: list[int] = []
    for parts in _PARTS:
        found: dict[int, None] = {}
        for number in range(1, parts):
            low, high = ((number + half) / parts * ends[-1] for half in (-0.5, 0.5))
            near = (alive[place] for place, end in enumerate(ends) if low < end <= high and alive[place])
            found |= dict.fromkeys(min(near, key=lambda values: _bytes(maps, values), default=[]))
        if found and list(found) != last:
            last = list(found)
            yield last


def _shares(maps: Maps, order: Sequence[Local]) -> list[float]:
    """Each op's share of the bytes of all maps plus its share of the bytes of all weights."""
    made = [_bytes(maps, local.op.outputs) for local in order]
    weights = [_bytes(maps, [v for v in local.op.inputs if v not in maps]) for local in order]
    return [a / max(1, sum(made)) + b / max(1, sum(weights)) for a, b in zip(made, weights, strict=True)]


def _alive(maps: Maps, order: Sequence[Local]) -> list[list[int]]:
    """For each op, the maps made so far that later ops read."""
    last = {v: place for place, local in enumerate(order) for v in local.reads}
    made = {v: place for place, local in enumerate(order) for v in local.op.outputs}
    return [[v for v, first in made.items() if first <= place < last.get(v, -1)] for place in range(len(order))]


def _bytes(maps: Maps, values: Sequence[int]) -> int:
    return sum(value_bytes(maps.program.values[v]) for v in values)
