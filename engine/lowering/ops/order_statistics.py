"""Rules of order statistics: per pixel over channels; over the image they need the whole map, which is stored.

A quantile is not a sum over tiles. Multiple-instance heads pool maps of one channel or a few in this form.
"""

from __future__ import annotations

from ...capture.program import Op, Ref
from .base import Local, Maps, Whole, arguments, dimensions, replay, rule
from .pointwise import only_maps
from .reductions import axes_after


@rule("median", "nanmedian", "quantile", "nanquantile", "mode")
def quantile(op: Op, maps: Maps) -> Local | Whole:
    value = op.inputs[0]
    quantiles = "quantile" in op.name
    dim = -1 if op.name == "mode" else None
    given = arguments(op, "input q dim keepdim" if quantiles else "input dim keepdim", dim=dim, keepdim=False)
    asked = given.get("q")
    only_maps(op, maps, value)
    dims = dimensions(given["dim"], len(maps.shape(value)))
    if set(dims) & set(maps.axes[value]):
        return Whole(op)
    h, w = axes_after(maps.axes[value], dims, given["keepdim"])
    if isinstance(asked, Ref) and maps.shape(asked.value):  # several quantiles: a new first dimension
        h, w = h + 1, w + 1
    return Local(op, {value: maps.pointwise(value)}, ((h, w),) * len(op.outputs), replay(op))


@rule("topk", "kthvalue")
def largest(op: Op, maps: Maps) -> Local | Whole:
    """The largest values along a dimension."""
    value = op.inputs[0]
    only_maps(op, maps, value)
    given = arguments(op, "input k dim keepdim", dim=-1, keepdim=False)
    dim = given["dim"] % len(maps.shape(value))
    if dim in maps.axes[value]:
        return Whole(op)
    axes = maps.axes[value] if op.name == "topk" else axes_after(maps.axes[value], (dim,), bool(given["keepdim"]))
    return Local(op, {value: maps.pointwise(value)}, (axes,) * 2, replay(op))
