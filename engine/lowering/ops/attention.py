"""Attention over positions of the image: keys and values are stored as whole maps, queries are computed by tile.

Every query attends to all keys, so no tile can be computed before the last key is known. The stage that makes keys and
values stores them; the next stage reads them as vectors. There attention is a local op: a tile has its own queries, all
keys and a softmax over them. The gradients of keys and values are summed over the tiles, as those of any vector.

    (N, heads, pixels, d) @ (N, heads, d, pixels)    left: queries, a map; right: all keys
    (N, heads, pixels, L) @ (N, heads, pixels, d)    left: a row of L weights per query; right: all values

Global queries (GCViT): all windows of an image are multiplied by the same positions of another map.

    (N*windows, heads, positions, d) @ (N*windows, heads, d, pixels of the window)

The left factor repeats the queries of each image for each of its windows. They are stored once per image, as a vector,
and each tile repeats them for its own windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...capture.program import Op, Ref
from .base import Block, Env, Local, Maps, Node, Refusal, Whole, arguments, part_of, replay, rule
from .promote import mapped, promoted, renamed


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
    behind = axes[0] - len(maps.shape(query)), axes[1] - len(maps.shape(query))
    if max(behind) < -2:
        return _of_windows(op, maps, (query, key, value), behind, rank)
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
        before = [mapped(op, maps, "alias", (made_of,), lambda x: x, output=query)[0]]
    own, nodes = take_whole(op, maps, [v for v in (key, value) if v in maps])
    own, made = _with_mask(own, maps, (-2, -2), rank)
    local = Local(own, {v: maps.pointwise(v) for v in maps.inputs(own)}, ((rank - 2, rank - 2),), replay(own))
    return [*before, *nodes, *made, _random(local, given["dropout_p"])]


def of_another_query(op: Op, maps: Maps) -> tuple[Op, int]:
    """The call with its query under a new value number, and that number."""
    by_name = "query" in op.kwargs
    query = op.kwargs["query"].value if by_name else op.args[0].value
    number = maps.new_value(like=query)
    args = op.args if by_name else (Ref(number), *op.args[1:])
    kwargs = {**op.kwargs, "query": Ref(number)} if by_name else op.kwargs
    return replace(op, args=args, kwargs=kwargs, inputs=(number, *op.inputs)), number


def _of_windows(op: Op, maps: Maps, values: Sequence[int], behind: tuple[int, int], rank: int) -> Local | list[Node]:
    """Attention inside each window of the image."""
    given = arguments(op, "query key value attn_mask dropout_p", dropout_p=0.0)
    others = {tuple(axis - len(maps.shape(v)) for axis in maps.axes[v]) for v in values if v in maps}
    if others != {behind} or any(v not in maps for v in values) or len({maps.extent(v) for v in values}) > 1:
        raise Refusal(f"'{op.name}' attends over positions of the image")
    axes = behind[0] + rank, behind[1] + rank
    own, made = _with_mask(op, maps, behind, rank)
    local = Local(own, {v: maps.pointwise(v) for v in maps.inputs(own)}, (axes,), replay(own))
    return [*made, _random(local, given["dropout_p"])]


def _with_mask(op: Op, maps: Maps, behind: tuple[int, int], rank: int) -> tuple[Op, list[Node]]:
    """The op with its mask, or bias, as a map with the image axes of the queries."""
    mask = arguments(op, "query key value attn_mask")["attn_mask"]
    if mask is None:
        return op, []
    if mask.value in maps:
        own = tuple(axis - len(maps.shape(mask.value)) for axis in maps.axes[mask.value])
        if own != behind or maps.extent(mask.value) != maps.extent(op.inputs[0]):
            raise Refusal(f"'{op.name}' has a mask whose image axes or size differ from those of its queries")
    return promoted(op, maps, (behind[0] + rank, behind[1] + rank), rank, among=(mask.value,))


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


# -- global queries ----------------------------------------------------------------------------------------------------

# Ops that compute each row by itself, if their other inputs are the same for all rows.
_EACH_ROW = frozenset("linear add sub reshape view flatten permute transpose contiguous mul div to float".split())


def once_for_each_image(op: Op, maps: Maps, queries: int, windows: int) -> tuple[Op, list[Node]]:
    """The op with `queries`, which are the same for all windows of an image, as a map over the windows.

    Raises:
        Refusal: if queries differ between windows, or the first dimension contains more than images and windows.
    """
    flat, rows = maps.flat.get(windows), maps.shape(queries)[0]
    times = _repeated(maps, queries)
    if flat is None or maps.axes[windows] != (0, 0) or flat.behind > 1 or times is None or flat.ahead * times != rows:
        raise Refusal(f"'{op.name}' cannot multiply windows by positions of another map that differ between windows")
    images = flat.ahead
    first = maps.new_value((images, *maps.shape(queries)[1:]), like=queries)
    local, _ = mapped(op, maps, "once", (queries,), lambda x: x.unflatten(0, (images, times))[:, 0], output=first)
    alone, nodes = take_whole(replace(op, args=(), kwargs={}, inputs=(first,)), maps, (first,))
    (vector,) = alone.inputs
    spread = maps.new_map((0, 0), like=queries, flat=flat)

    def repeat(env: Env, block: Block) -> tuple[Tensor, ...]:
        return (env[vector].repeat_interleave(math.prod(block.size), 0),)

    own = part_of(op, "spread", (windows, vector), (spread,))
    made = Local(own, {windows: maps.pointwise(windows)}, ((0, 0),), repeat)
    return renamed(op, {queries: spread}), [local, *nodes, made]


def _repeated(maps: Maps, value: int) -> int | None:
    """How often a value repeats the part of each image; None if no repetition made it."""
    while True:
        maker = next((op for op in maps.program.ops if value in op.outputs), None)
        if maker is None or not maker.inputs:
            return None
        value = maker.inputs[0]
        before, after = maps.shape(value), maps.shape(maker.outputs[0])
        if maker.name == "repeat_interleave":
            given = arguments(maker, "input repeats dim", dim=None)
            return given["repeats"] if given["dim"] == 0 and isinstance(given["repeats"], int) else None
        if maker.name == "repeat" and before[0] == 1 and after[1:] == before[-len(after) + 1 :]:
            return after[0]
        others = [maps.shape(v) for v in maker.inputs[1:]]
        alike = all(len(shape) < len(after) or shape[0] == 1 for shape in others) and before[0] == after[0]
        if maker.name not in _EACH_ROW or not alike or _moves_rows(maker, len(before)):
            return None


def _moves_rows(op: Op, rank: int) -> bool:
    """Whether a permutation moves the first dimension."""
    if op.name not in ("permute", "transpose"):
        return False
    given = [*op.args[1:], *op.kwargs.values()]
    dims = [d % rank for one in given for d in (one if isinstance(one, Sequence) else [one])]
    return dims[0] != 0 if op.name == "permute" else 0 in dims
