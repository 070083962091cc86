"""Hooks of tensors, which are given whole gradients: Dynamo's graph has them as calls (`capture.higher_order`)."""

from __future__ import annotations

from ...capture.program import Op
from .base import Maps, Refusal, Whole, rule


@rule("tensor_hook")
def tensor_hook(op: Op, maps: Maps) -> Whole:
    """The output is the first input, with a node of its own."""
    (made,), given = op.outputs, op.inputs[0]
    if given in maps and given in maps.flat:
        raise Refusal("a hook on a flattened map")
    return Whole(op, {made: maps.axes[given]} if given in maps else {})
