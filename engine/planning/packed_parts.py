"""Where a prediction by one stage may be cut, so that the packed weights of a part are there at a time, not of all.

Convolutions and linear layers on the CPU compute with weights that are packed at the start of a stage
(`lowering/onednn.py`), as many bytes again as the network has, or more. Deep layers have the most weights and the
smallest maps: a cut before one of them stores little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..capture.program import Op
from ..lowering.ops import Local, Maps, Node
from ..lowering.stages import Stage
from .interstage import value_bytes

_PARTS = (2, 3, 4, 6, 8)  # a part has about such a share of the weights
_WORTH = 1 << 20  # bytes of weights, below which parts save nothing to speak of


def packed_bytes(stage: Stage) -> int:
    """Bytes of the weights that a stage packs, as the network has them."""
    return sum(_weights(stage.maps, stage.locals).values())


def cuts_by_weights(maps: Maps, nodes: Sequence[Node | Op], through: Sequence[int]) -> Iterator[list[int]]:
    """The maps to cut at, for fewer and fewer weights in a part.

    Args:
        through: maps that everything after them goes through, in program order.
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
    """Cuts before a part would have more than so many bytes of weights, where one can be made."""
    part: dict[int, int] = {}  # weights since the last cut
    later: dict[int, int] = {}  # those of them after `place`
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
    """Bytes of what these convolutions and linear layers read besides maps, by value number."""
    values = maps.program.values
    convs = (local.op for local in order if local.op.name in ("conv2d", "linear"))
    return {v: value_bytes(values[v]) for op in convs for v in op.inputs if v not in maps}
