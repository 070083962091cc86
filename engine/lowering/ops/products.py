"""Rules of matrix products: matmul, @, bmm, linear.

(N, HW, C) @ (C, D)                 per pixel: one matrix for all positions, or one for each
(N, C, HW) @ (N, HW, D)             a sum over the positions: Gram and covariance matrices, attention pooling
(N, C, HW) @ (HW, 2)                the same with a constant: soft-argmax, pooling with fixed weights
(N, C, H, W) @ (W,), (H,) @ ...     a sum over one of the image's axes, weighted
"""

from __future__ import annotations

import torch

from ...capture.program import Op
from ..geometry import Cells
from .attention import asks_all, once_for_each_image, take_whole
from .base import Local, Maps, Node, Reduction, Refusal, Whole, arguments, nodes_of, part_of, replay, rule
from .contract import contraction
from .pointwise import only_maps
from .promote import mapped, spread_strip, vector


@rule("matmul", "__matmul__", "bmm")
def matmul(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    given = list(op.args[:2])
    if len(given) < 2:
        given += [op.kwargs[name] for name in ("other", "mat2") if name in op.kwargs]
    left, right = (ref.value for ref in given)
    return _product(op, maps, left, right, _behind(maps, left), _behind(maps, right))


def _behind(maps: Maps, value: int) -> tuple[int, int] | None:
    """The image axes of a map, counted from the last dimension (-1); None for a vector."""
    if value not in maps:
        return None
    h, w = maps.axes[value]
    return h - len(maps.shape(value)), w - len(maps.shape(value))


def _product(
    op: Op, maps: Maps, left: int, right: int, first: tuple[int, int] | None, second: tuple[int, int] | None
) -> Local | Whole | list[Node]:
    ranks = len(maps.shape(left)), len(maps.shape(right))
    if first == (-1, -1) and (second == (-2, -2) or second is None):
        return _over_positions(op, maps, left, right)
    if second is not None and first is None and second[0] == second[1] == (-1 if ranks[1] == 1 else -2):
        return _over_positions(op, maps, left, right)
    if _is_strip(first, second, ranks):
        return _over_one_axis(op, maps, left, right)
    if first is not None and second is not None:
        whole = asks_all(maps, left, right, first, second, ranks)
        if whole is not None:
            own, nodes = take_whole(op, maps, (whole,))
        elif (max(first) <= -3) != (max(second) <= -3):
            own, nodes = once_for_each_image(op, maps, *((left, right) if max(second) <= -3 else (right, left)))
        else:
            own, nodes = op, []
        if own is not op:
            return [*nodes, *nodes_of(own, maps)]
    found = [axes for axes in (first, second) if axes is not None]
    contracted = (first is not None and -1 in first) or (second is not None and (-2 if ranks[1] > 1 else -1) in second)
    if contracted and len(found) == 1:
        return Whole(op)
    if contracted or len(set(found)) > 1 or (len(found) == 2 and max(found[0]) > -3):
        raise Refusal(f"'{op.name}' cannot contract positions of the image with each other")
    if len({maps.extent(v) for v in (left, right) if v in maps}) > 1:
        raise Refusal(f"'{op.name}' combines maps of different sizes")
    axes = found[0]
    for other in {left, right} - set(maps.axes):
        shape = maps.shape(other)
        if any(axis <= -3 and -axis <= len(shape) and shape[axis] != 1 for axis in axes):
            raise Refusal(f"'{op.name}' cannot use a different matrix for each position of the image")
    rank = len(maps.shape(op.outputs[0]))
    if ranks[1] == 1:  # a vector on the right removes the last dimension
        axes = axes[0] + 1, axes[1] + 1
    elif ranks[0] == 1:  # a vector on the left removes the last but one
        axes = axes[0] + (axes[0] < -1), axes[1] + (axes[1] < -1)
    reads = {v: maps.pointwise(v) for v in (left, right) if v in maps}
    return Local(op, reads, ((axes[0] + rank, axes[1] + rank),), replay(op))


@rule("linear")
def linear(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    """Per pixel; along the positions of a flattened map (MLP-Mixer) a weighted sum over the positions."""
    given = arguments(op, "input weight bias")
    value, weight, bias = given["input"].value, given["weight"].value, given["bias"]
    rank = len(maps.shape(value))
    if value not in maps or rank - 1 not in maps.axes[value]:
        only_maps(op, maps, value)
        return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))
    if value not in maps.flat:
        raise Refusal("'linear' cannot contract an image axis; flatten both image axes first")
    output, info = op.outputs[0], maps.program.values[op.outputs[0]]
    if maps.merged(value) or rank < 2 or maps.inputs(op) != [value] or info.dtype.is_complex:
        return Whole(op)  # a classifier after a flatten: a weight for each element
    product = output if bias is None else maps.new_value(like=output)
    own = part_of(op, "matmul", (value, weight), (product,))
    batch = [str(d) for d in range(rank - 1)]
    nodes = contraction(own, maps, (value, weight), ([*batch, "p"], ["d", "p"]), [*batch, "d"])
    assert isinstance(nodes, list)
    if bias is not None:
        nodes.append(vector((product, bias.value), output, lambda x, b: (x + b).to(info.dtype)))
    return nodes


# -- over all positions of a flattened map ----------------------------------------------------------------------------


def _over_positions(op: Op, maps: Maps, left: int, right: int) -> Local | Whole | list[Node]:
    """(..., c, pixels) @ (..., pixels, d); a factor without image axes has a value for each position."""
    known = left if left in maps else right
    if maps.merged(known) and (left not in maps or right not in maps):
        raise Refusal(f"'{op.name}' cannot contract a flattened map that contains more than the image axes")
    first, second = len(maps.shape(left)), len(maps.shape(right))
    batch = [str(d) for d in range(max(first, second) - 2, 0, -1)]
    rows, cols = ["c"] if first > 1 else [], ["d"] if second > 1 else []
    terms = (
        [*(d for d in batch if int(d) <= first - 2), *rows, "p"],
        [*(d for d in batch if int(d) <= second - 2), "p", *cols],
    )
    return contraction(op, maps, (left, right), terms, [*batch, *rows, *cols])


# -- over one of the image's axes -------------------------------------------------------------------------------------


def _is_strip(first: tuple[int, int] | None, second: tuple[int, int] | None, ranks: tuple[int, int]) -> bool:
    """Whether a vector meets one of the two image axes of a map."""
    if first is not None and second is None and ranks[1] == 1:
        return -1 in first and first[0] != first[1]
    return second is not None and first is None and ranks[0] == 1 and -2 in second and second[0] != second[1]


def _over_one_axis(op: Op, maps: Maps, left: int, right: int) -> list[Node]:
    """A map and a vector with a value for each column, or each row."""
    value, vector = (left, right) if left in maps else (right, left)
    rank, axes, size = len(maps.shape(value)), maps.axes[value], maps.size(value)
    dim = rank - 1 if value == left else rank - 2
    shape = [maps.shape(vector)[0] if d == dim else 1 for d in range(rank)]
    nodes, weights = spread_strip(op, maps, vector, shape, axes, size)
    wide = torch.promote_types(maps.program.values[op.outputs[0]].dtype, torch.float32)
    local, made = mapped(op, maps, "weighted", (value, weights), lambda x, w: x.to(wide) * w.to(wide), wide)
    rows, cols = (Cells(n, 1 if axis == dim else n) for axis, n in zip(axes, size, strict=True))
    return [*nodes, local, Reduction(op, made, "sum", 1, (dim,), False, grid=(rows, cols))]
