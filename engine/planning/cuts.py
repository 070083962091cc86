"""Cuts of a step with one stage, so that a tile runs through one part of the network at a time.

In training, a tile of one stage holds the saved tensors of all layers, and all folded weights and their copies. Divided
into parts, with stored maps in between, it holds those of one part only. Early layers make the largest maps, late
layers have the most weights; parts have about equal shares of their sum.

In inference on the CPU, convolutions and linear layers use weights that are packed at the start of a stage
(`lowering/onednn.py`). The packed weights take as many bytes as the weights, or more. Deep layers have the most weights
and the smallest maps, so a cut before such a layer stores little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from ..capture.program import Op
from ..lowering.ops import Local, Maps, Node
from ..lowering.stages import ProgramStage
from .interstage import value_bytes

_TRAINING_PARTS = (2, 3, 4, 6, 9, 13, 20)
_INFERENCE_PARTS = (2, 3, 4, 6, 8)  # numbers of parts with about equal bytes of weights
_WORTH = 1 << 20  # with fewer bytes of weights, parts save little in inference


def cuts_by_outputs(maps: Maps, nodes: Sequence[Node | Op]) -> Iterator[list[int]]:
    """Lists of maps to cut at, for smaller and smaller parts; each cut is where it stores few bytes."""
    order = [node for node in nodes if isinstance(node, Local)]
    alive, ends = _alive(maps, order), list(accumulate(_shares(maps, order)))
    last: list[int] = []
    for parts in _TRAINING_PARTS if order else ():
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


def packed_bytes(stage: ProgramStage) -> int:
    """Bytes of the weights that a stage packs, before packing."""
    return sum(_weights(stage.maps, stage.locals).values())


def cuts_by_weights(maps: Maps, nodes: Sequence[Node | Op], through: Sequence[int]) -> Iterator[list[int]]:
    """Lists of maps to cut at, for parts with fewer and fewer weights.

    Args:
        maps: the maps of the program.
        nodes: its sorted nodes.
        through: maps on which all later ops depend, in program order.
    """
    order = [node for node in nodes if isinstance(node, Local)]
    total = sum(_weights(maps, order).values())
    last: list[int] = []
    for parts in _INFERENCE_PARTS if total >= _WORTH else ():
        found = list(_cuts(maps, order, frozenset(through), total // parts))
        if found and found != last:
            yield found
        last = found


def _cuts(maps: Maps, order: Sequence[Local], through: frozenset[int], most: int) -> Iterator[int]:
    """The latest possible cuts so that no part has more than `most` bytes of weights, if possible."""
    part: dict[int, int] = {}  # weights since the last cut
    later: dict[int, int] = {}  # weights after `place`
    place = None  # the last map that a cut could be made at
    for node in order:
        own = _weights(maps, [node])
        if place is not None and sum((part | own).values()) > most:
            yield place
            part, place = dict(later), None
        part |= own
        later |= own
        made = through.intersection(node.op.outputs)
        if made and part:
            (place,), later = made, {}


def _weights(maps: Maps, order: Sequence[Local]) -> dict[int, int]:
    """Bytes of the weights and biases of these convolutions and linear layers, by value number."""
    values = maps.program.values
    convs = (local.op for local in order if local.op.name in ("conv2d", "linear"))
    return {v: value_bytes(values[v]) for op in convs for v in op.inputs if v not in maps}
