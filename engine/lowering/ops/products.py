"""Rules of matrix products: matmul, @, bmm, linear.

(N, HW, C) @ (C, D)                 per pixel: one matrix for all positions, or one for each
(N, C, HW) @ (N, HW, D)             a sum over the positions: Gram and covariance matrices, attention pooling
(N, C, HW) @ (HW, 2)                the same with a constant: soft-argmax, pooling with fixed weights
(N, C, H, W) @ (W,), (H,) @ ...     a sum over one of the image's axes, weighted
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...capture.program import Op
from ..geometry import Cells
from .attention import asks_all, take_whole
from .base import Block, Env, Local, Maps, Node, Reduction, Refusal, VectorOp, Whole, arguments, replay, rule
from .global_queries import once_for_each_image
from .pointwise import only_maps
from .promote import promoted, spread_strip


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
            made = matmul(own, maps)
            return [*nodes, *(made if isinstance(made, list) else [made])]
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
    if maps.merged(value) or rank < 2 or maps.inputs(op) != [value]:
        return Whole(op)  # a classifier after a flatten: a weight for each element
    output = op.outputs[0]
    dtype = maps.program.values[output].dtype
    transposed = maps.new_value(maps.shape(weight)[::-1], like=weight)
    product = output if bias is None else maps.new_value(like=output)
    own = Op(torch.matmul, "matmul", (), {}, (value, transposed), (product,), (), op.module, line=op.line)
    nodes: list[Node] = [VectorOp(lambda env: (env[weight].t(),), (weight,), (transposed,))]
    nodes += _over_positions(own, maps, value, transposed)
    if bias is not None:
        added = bias.value
        plus = VectorOp(lambda env: ((env[product] + env[added]).to(dtype),), (product, added), op.outputs)
        nodes.append(plus)
    return nodes


# -- over all positions of a flattened map ----------------------------------------------------------------------------


def _over_positions(op: Op, maps: Maps, left: int, right: int) -> list[Node]:
    """(..., c, pixels) @ (..., pixels, d); a factor without image axes has a value for each position."""
    nodes: list[Node] = []
    vectors = len(maps.shape(left)) == 1, len(maps.shape(right)) == 1
    known = left if left in maps else right
    merged = maps.merged(known)
    if merged and (left not in maps or right not in maps):
        raise Refusal(f"'{op.name}' cannot contract a flattened map that contains more than the image axes")
    sides = []
    for value, behind in ((left, -1), (right, -1 if vectors[1] else -2)):
        if value in maps:
            sides.append(value)
            continue
        rank = len(maps.shape(value))
        alone = replace(op, args=(), kwargs={}, inputs=(known, value))
        axis = rank + behind
        renamed_op, made = promoted(alone, maps, (axis, axis), rank)
        nodes.extend(made)
        sides.append(renamed_op.inputs[1])
    left, right = sides
    if left not in maps or right not in maps or maps.flat[left] != maps.flat[right]:
        raise Refusal(f"'{op.name}' cannot contract maps of different sizes")
    shapes = tuple(
        (1, *shape) if vector and side == 0 else (*shape, 1) if vector else tuple(shape)
        for side, (shape, vector) in enumerate(zip((maps.shape(left), maps.shape(right)), vectors, strict=True))
    )
    (c, pixels), d = shapes[0][-2:], shapes[1][-1]
    batch = torch.broadcast_shapes(shapes[0][:-2], shapes[1][:-2])
    values = maps.program.values
    dtype = torch.promote_types(values[left].dtype, values[right].dtype)
    pair = maps.new_value((*batch, c + d, pixels), dtype, like=left)
    maps.axes[pair] = (len(batch) + 1, len(batch) + 1)
    maps.flat[pair] = maps.flat[left]

    def join(env: Env, _block: Block) -> tuple[Tensor, ...]:
        rows = env[left][None] if vectors[0] else env[left]
        cols = env[right][None] if vectors[1] else env[right].transpose(-1, -2)
        return (torch.cat([part.expand(*batch, *part.shape[-2:]).to(dtype) for part in (rows, cols)], -2),)

    def product(block: Tensor) -> Tensor:
        x = block.flatten(-4 if merged else -2).to(torch.promote_types(block.dtype, torch.float32))
        with torch.autocast(block.device.type, enabled=False):
            return x[..., :c, :] @ x[..., c:, :].transpose(-1, -2)

    both = {v: maps.pointwise(v) for v in (left, right)}
    joined = Op(op.func, "pair", (), {}, (left, right), (pair,), (), op.module, line=op.line)
    nodes.append(Local(joined, both, (maps.axes[pair],), join))
    if not any(vectors):
        return [*nodes, Reduction(op, pair, "sum", 1, (), True, form=product)]
    full = maps.new_value((*batch, c, d), like=op.outputs[0])
    shape = tuple(maps.shape(op.outputs[0]))
    drop = VectorOp(lambda env: (env[full].reshape(shape),), (full,), op.outputs)
    return [*nodes, Reduction(op, pair, "sum", 1, (), True, outputs=(full,), form=product), drop]


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
    dtype = maps.program.values[op.outputs[0]].dtype
    made = maps.new_value(dtype=torch.promote_types(dtype, torch.float32), like=value)
    maps.axes[made] = axes
    wide = maps.program.values[made].dtype

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (env[value].to(wide) * env[weights].to(wide),)

    own = Op(torch.mul, "weighted", (), {}, (value, weights), (made,), (), op.module, line=op.line)
    local = Local(own, {v: maps.pointwise(v) for v in (value, weights)}, (axes,), run)
    rows, cols = (Cells(n, 1 if axis == dim else n) for axis, n in zip(axes, size, strict=True))
    return [*nodes, local, Reduction(op, made, "sum", 1, (dim,), False, grid=(rows, cols))]
