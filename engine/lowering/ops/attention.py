"""Attention over positions of the image: keys and values are stored as whole maps, queries are computed by tile.

Every query attends to all keys, so no tile can be computed before the last key is known. The stage that makes keys and
values stores them; the next stage reads them as vectors. There attention is a local op: a tile has its own queries, all
keys and a softmax over them. The gradients of keys and values are summed over the tiles, as those of any vector.

    (N, heads, pixels, d) @ (N, heads, d, pixels)    left: queries, a map; right: all keys
    (N, heads, pixels, L) @ (N, heads, pixels, d)    left: a row of L weights per query; right: all values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...capture.program import Op, Ref
from .base import Local, Maps, Node, Refusal, Whole, arguments, replay, rule
from .promote import promoted, renamed


def take_whole(op: Op, maps: Maps, values: Sequence[int]) -> tuple[Op, list[Node]]:
    """The op with the maps `values`, which it reads at all positions, as vectors."""
    nodes: list[Node] = []
    names: dict[int, int] = {}
    for value in dict.fromkeys(values):
        names[value] = maps.new_value(like=value)
        whole = Op(torch.Tensor.contiguous, "contiguous", (Ref(value),), {}, (value,), (names[value],), (), op.module)
        nodes.append(Whole(whole))
    return renamed(op, names), nodes


@rule("scaled_dot_product_attention")
def attention(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    """Per pixel if the image axes are batch dimensions; else each pixel's query attends to all keys."""
    given = arguments(op, "query key value attn_mask dropout_p is_causal", dropout_p=0.0, is_causal=False)
    query, key, value = (given[name].value for name in ("query", "key", "value"))
    rank = len(maps.shape(op.outputs[0]))
    if query not in maps:
        return Whole(op)  # a few queries of their own pool the map
    axes = maps.axes[query]
    behind = tuple(axis - len(maps.shape(query)) for axis in axes)
    if max(behind) < -2:
        return _of_windows(op, maps, (query, key, value), given["attn_mask"], behind, rank)
    if behind[0] != behind[1]:
        raise Refusal(f"'{op.name}' cannot attend along one axis of the image; attend over both")
    if behind != (-2, -2) or given["is_causal"]:
        raise Refusal(
            f"'{op.name}' cannot attend over positions of the image with a causal mask or in other dimensions than -2"
        )
    before: list[Node] = []
    if query in (key, value):  # one tensor is both: a map as queries, a vector as keys
        made_of = query
        op, query = of_another_query(op, maps)
        before = [_renumbered(op, maps, made_of, query)]
    own, nodes = take_whole(op, maps, [v for v in (key, value) if v in maps])
    own, made = _with_mask(own, maps, rank - 2, rank)
    local = Local(own, {v: maps.pointwise(v) for v in maps.inputs(own)}, ((rank - 2, rank - 2),), replay(own))
    return [*before, *nodes, *made, _random(local, given["dropout_p"])]


def _renumbered(op: Op, maps: Maps, value: int, number: int) -> Local:
    """A map under another number."""
    maps.axes[number] = maps.axes[value]
    if value in maps.flat:
        maps.flat[number] = maps.flat[value]
    own = Op(torch.Tensor.detach, "alias", (), {}, (value,), (number,), (), op.module, line=op.line)
    return Local(own, {value: maps.pointwise(value)}, (maps.axes[value],), lambda env, _block: (env[value],))


def of_another_query(op: Op, maps: Maps) -> tuple[Op, int]:
    """The call with its query under a new value number, and that number."""
    by_name = "query" in op.kwargs
    query = op.kwargs["query"].value if by_name else op.args[0].value
    number = maps.new_value(like=query)
    args = op.args if by_name else (Ref(number), *op.args[1:])
    kwargs = {**op.kwargs, "query": Ref(number)} if by_name else op.kwargs
    return replace(op, args=args, kwargs=kwargs, inputs=(number, *op.inputs)), number


def _of_windows(
    op: Op, maps: Maps, values: Sequence[int], mask: Ref | None, behind: tuple[int, ...], rank: int
) -> Local | list[Node]:
    """Attention inside each window of the image."""
    given = arguments(op, "query key value attn_mask dropout_p", dropout_p=0.0)
    others = {tuple(axis - len(maps.shape(v)) for axis in maps.axes[v]) for v in values if v in maps}
    if others != {behind} or any(v not in maps for v in values) or len({maps.extent(v) for v in values}) > 1:
        raise Refusal(f"'{op.name}' attends over positions of the image")
    if mask is not None and mask.value in maps:
        lies = tuple(axis - len(maps.shape(mask.value)) for axis in maps.axes[mask.value])
        if lies != behind or maps.extent(mask.value) != maps.extent(values[0]):
            raise Refusal(f"'{op.name}' has a mask whose image axes or size differ from those of its queries")
    axes = behind[0] + rank, behind[1] + rank
    own, made = (op, []) if mask is None else promoted(op, maps, axes, rank, among=(mask.value,))
    local = Local(own, {v: maps.pointwise(v) for v in maps.inputs(own)}, (axes,), replay(own))
    return [*made, _random(local, given["dropout_p"])]


def _with_mask(op: Op, maps: Maps, axis: int, rank: int) -> tuple[Op, list[Node]]:
    """The op with its mask, or bias, as a map with a row for each query."""
    mask = arguments(op, "query key value attn_mask")["attn_mask"]
    if mask is None:
        return op, []
    if mask.value in maps:
        own = {axis_of_mask - len(maps.shape(mask.value)) for axis_of_mask in maps.axes[mask.value]}
        if own != {-2} or maps.extent(mask.value) != maps.extent(op.inputs[0]):
            raise Refusal(f"'{op.name}' has a mask whose image axes or size differ from those of its queries")
        return op, []
    return promoted(op, maps, (axis, axis), rank, among=(mask.value,))


def _random(local: Local, dropout: float) -> Local:
    local.random = dropout > 0
    return local


def asks_all(
    maps: Maps, left: int, right: int, first: tuple[int, int], second: tuple[int, int], ranks: tuple[int, int]
) -> int | None:
    """The factor of a matrix product of two maps that each position of the other reads whole; None if neither.

    Args:
        first, second: the image axes of the factors, counted from the last dimension (-1).
        ranks: the ranks of the factors.
    """
    contracts = -1 in first, (-2 if ranks[1] > 1 else -1) in second
    if contracts != (True, True) and not (maps.merged(left) or maps.merged(right)):
        if any(contracts):
            return left if contracts[0] else right
        if first == (-2, -2) and second == (-1, -1):
            return right
    single = [v for v in (left, right) if maps.size(v) == (1, 1)]
    return single[0] if len(single) == 1 else None  # a window that is all of the map (HaloNet) has nothing to cut
