"""Rule of tensor hooks, which receive whole gradients; Dynamo records them as calls (`capture.higher_order`)."""

from __future__ import annotations

from ...capture.program import Op
from .base import Maps, Refusal, Whole, rule


@rule("tensor_hook")
def tensor_hook(op: Op, maps: Maps) -> Whole:
    """The output is the first input under a new value number."""

    (made,), given = op.outputs, op.inputs[0]
    if given in maps and given in maps.flat:
        raise Refusal("a tensor hook on a flattened map is not supported; register it on a map with both image axes")
    return Whole(op, {made: maps.axes[given]} if given in maps else {})
