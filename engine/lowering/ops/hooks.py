"""Backward hooks of modules, which are given whole gradients: `capture.module_hooks` records them as calls."""

from __future__ import annotations

from ...capture.trace import Op
from .base import Maps, Refusal, Whole, rule


@rule("module_hook")
def module_hook(op: Op, maps: Maps) -> Whole:
    """Each output is one of the inputs, the last ones, with a node of its own."""
    pairs = zip(reversed(op.outputs), reversed(op.inputs), strict=False)
    found = {made: given for made, given in pairs if given in maps}
    if any(given in maps.flat for given in found.values()):
        raise Refusal("a backward hook of a module on a flattened map")
    return Whole(op, {made: maps.axes[given] for made, given in found.items()})
