"""Cuts of one-stage inference on the CPU, so that the packed weights of only one part are resident at a time.

Convolutions and linear layers on the CPU use weights that are packed at the start of a stage (`lowering/onednn.py`).
The packed weights take as many bytes as the weights, or more. Deep layers have the most weights and the smallest maps,
so a cut before such a layer stores little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..capture.program import Op
from ..lowering.ops import Local, Maps, Node
from ..lowering.stages import Stage
from .interstage import value_bytes

_PARTS = (2, 3, 4, 6, 8)  # numbers of parts with about equal bytes of weights
_WORTH = 1 << 20  # with fewer bytes of weights, parts save little


def packed_bytes(stage: Stage) -> int:
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
    for parts in _PARTS if total >= _WORTH else ():
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
