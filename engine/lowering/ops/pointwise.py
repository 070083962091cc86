"""Rules of ops that act on each pixel by itself: arithmetic, activations, frozen norms, channel reductions, dropout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...capture.program import Op
from ...torch_private import tree_leaves
from .base import Axes, Block, Env, Local, Maps, Node, Refusal, VectorOp, arguments, replay, rule
from .names import ELEMENTWISE
from .promote import over_resident, promoted, renamed, spread, vector


def aligned_axes(op: Op, maps: Maps, rank: int) -> tuple[int, int]:
    """The image axes of a broadcast result of `rank` dimensions; all map operands must agree on them."""
    found = set()
    sizes = set()
    for value in maps.inputs(op):
        h, w = maps.axes[value]
        shift = rank - len(maps.shape(value))
        found.add((h + shift, w + shift))
        sizes.add(maps.extent(value))
    if len(found) != 1:
        raise Refusal(f"'{op.name}' combines maps with different image axes; permute them first")
    if len(sizes) != 1:
        both = " and ".join(sorted(str(size) for size in sizes))
        raise Refusal(f"'{op.name}' combines maps of different sizes, {both}")
    return found.pop()


@rule(*ELEMENTWISE)
def elementwise(op: Op, maps: Maps) -> Local | list[Node]:
    if op.name in ("to", "type_as") and len(op.inputs) > 1:
        return _like_another(op, maps)
    rank = len(maps.shape(op.outputs[0]))
    axes = aligned_axes(op, maps, rank)
    op, wider = _widened(op, maps, axes, maps.shape(op.outputs[0]))
    op, made = promoted(op, maps, axes, rank)
    made = [*wider, *made]
    local = Local(op, {v: maps.pointwise(v) for v in maps.inputs(op)}, (axes,) * len(op.outputs), replay(op))
    return [*made, local] if made else local


def _widened(op: Op, maps: Maps, axes: Axes, shape: torch.Size) -> tuple[Op, list[Node]]:
    """The op with maps of one row or column broadcast to maps of the result's size."""
    nodes: list[Node] = []
    names: dict[int, int] = {}
    for value in maps.inputs(op):
        size = shape[axes[0]], shape[axes[1]]
        own = maps.size(value)
        if value in maps.flat or own == size or any(n not in (1, m) for n, m in zip(own, size, strict=True)):
            continue
        full = list(maps.shape(value))
        for axis, n in zip(maps.axes[value], size, strict=True):
            full[axis] = n
        names[value] = maps.new_map(maps.axes[value], full, like=value)
        nodes.append(spread(op, maps, value, {value: over_resident(maps, value, size)}, names[value], maps.axes[value]))
    return (renamed(op, names), nodes) if names else (op, nodes)


def _like_another(op: Op, maps: Maps) -> Local | list[Node]:
    """A tensor in the dtype and on the device of another, whose values are not read."""
    value, like = op.inputs[0], maps.program.values[op.outputs[0]]
    if value not in maps:
        return [VectorOp(lambda env: (env[value].to(like.device, like.dtype),), (value,), op.outputs)]
    own = replace(op, inputs=(value,))
    return Local(own, {value: maps.pointwise(value)}, (maps.axes[value],), lambda env, _: (env[value].to(like.dtype),))


def _random(made: Local | list[Node], random: bool) -> Local | list[Node]:
    local = made[-1] if isinstance(made, list) else made
    assert isinstance(local, Local)
    local.random = random
    return made


def on_channels(op: Op, maps: Maps, value: int) -> Local:
    """A per-pixel op whose parameters belong to dimension 1."""
    if 1 in maps.axes[value]:
        raise Refusal(f"'{op.name}' has an image axis as channel dimension")
    only_maps(op, maps, value)
    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))


def only_maps(op: Op, maps: Maps, *values: int) -> None:
    if set(maps.inputs(op)) - set(values):
        raise Refusal(f"'{op.name}' cannot use parameters that depend on the image")


@rule("bucketize", "isin")
def compared(op: Op, maps: Maps) -> Local:
    """Compares each element of a map with all elements of a vector."""
    value = op.inputs[0]
    if value not in maps:
        raise Refusal(f"'{op.name}' cannot compare a tensor with all positions of the image")
    only_maps(op, maps, value)
    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))


@rule("prelu", "local_response_norm", "channel_shuffle", "native_channel_shuffle")
def with_channel_parameters(op: Op, maps: Maps) -> Local:
    return on_channels(op, maps, op.inputs[0])


@rule("dropout", "alpha_dropout")
def dropout(op: Op, maps: Maps) -> Local | list[Node]:
    given = arguments(op, "input p training inplace", p=0.5, training=True)
    return _random(elementwise(op, maps), bool(given["training"]) and given["p"] > 0)


@rule("feature_dropout", "dropout1d", "dropout2d", "dropout3d")
def channel_dropout(op: Op, maps: Maps) -> Local | list[Node]:
    """One draw per sample and channel, shared by all positions: a vector, drawn once per step as PyTorch draws it."""
    value = op.inputs[0]
    given = arguments(op, "input p training inplace", p=0.5, training=True)
    shape, axes = maps.shape(value), maps.axes[value]
    if set(axes) & {0, 1}:
        raise Refusal(f"'{op.name}' has an image axis as channel dimension")
    if op.name == "dropout1d" or len(shape) not in (4, 5):
        raise Refusal(f"'{op.name}' needs a map of four or five dimensions, not {len(shape)}")
    reads = {value: maps.pointwise(value)}
    if not given["training"] or given["p"] <= 0:
        return Local(op, reads, (axes,), replay(op))
    per_channel = (*shape[:2], *[1] * (len(shape) - 2))
    mask, info = maps.new_value(per_channel, like=value), maps.program.values[value]

    def draw() -> Tensor:
        ones = torch.ones(per_channel, dtype=info.dtype, device=info.device)
        return torch.feature_dropout(ones, given["p"], True)

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (env[value] * env[mask],)

    return [vector((), mask, draw), Local(replace(op, inputs=(value, mask)), reads, (axes,), run)]


@rule("rand_like", "randn_like", "bernoulli", "rrelu")
def noise(op: Op, maps: Maps) -> Local | list[Node]:
    if any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((op.args, op.kwargs))):
        raise Refusal(f"'{op.name}' cannot draw a map from its own generator; use PyTorch's default generator")
    random = op.name != "rrelu" or bool(arguments(op, "input lower upper training")["training"])
    return _random(elementwise(op, maps), random)


class _WithZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *unread: Tensor) -> Tensor:
        ctx.unread = [t.detach() for t in unread]  # not saved: their values are not needed, so they may change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *map(torch.zeros_like, ctx.unread)


def with_zeros(x: Tensor, *unread: Tensor) -> Tensor:
    """The same tensor; its backward returns zeros for the tensors in `unread`.

    They are parameters that lowering no longer reads, such as a token that is joined and cut off again. PyTorch gives
    them zeros, not None, and optimizers treat them differently: with zeros they decay a weight and its momentum.
    """
    return _WithZeros.apply(x, *unread)  # pyright: ignore[reportReturnType]


@rule("with_zeros")
def copy_with_zeros(op: Op, maps: Maps) -> Local:
    value, *unread = op.inputs

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (with_zeros(env[value], *(env[v] for v in unread)),)

    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), run)
