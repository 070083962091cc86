"""Rules of losses with a label for each position: the loss per pixel, and a sum over the image.

A mean of class losses divides by the sum of the weights of the labels that are not ignored:

    cross_entropy, mean    loss per pixel -> sum;  weight of its label -> sum;  their ratio

The means of `mse_loss` and `l1_loss` divide by the weights of the pixels; all others by the number of pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...capture.program import Op, Ref
from .base import Axes, Block, Env, Local, Maps, Node, Reduction, Refusal, arguments, axes_after, part_of, rule
from .pointwise import elementwise
from .promote import vector
from .reductions import exact

_ELEMENTWISE = {
    "binary_cross_entropy_with_logits": "input target weight size_average reduce reduction pos_weight",
    "binary_cross_entropy": "input target weight size_average reduce reduction",
    "mse_loss": "input target size_average reduce reduction weight",
    "l1_loss": "input target size_average reduce reduction weight",
    "smooth_l1_loss": "input target size_average reduce reduction beta weight",
    "huber_loss": "input target reduction delta weight",
    "soft_margin_loss": "input target size_average reduce reduction",
    "kl_div": "input target size_average reduce reduction log_target",
    "poisson_nll_loss": "input target log_input full size_average eps reduce reduction",
}
_CLASSES = "input target weight size_average ignore_index reduce reduction label_smoothing"


def _reduction(given: dict[str, Any]) -> str:
    """The reduction of a loss, also from the deprecated arguments."""
    averages, reduces = given.get("size_average"), given.get("reduce")
    if averages is None and reduces is None:
        return given["reduction"]
    if reduces is not None and not reduces:
        return "none"
    return "mean" if averages is None or averages else "sum"


def _total(op: Op, maps: Maps, value: int, output: int, count: int = 1) -> Reduction:
    """The sum over all dimensions of a map."""
    return Reduction(op, value, "sum", count, tuple(range(len(maps.shape(value)))), False, outputs=(output,))


@rule(*_ELEMENTWISE)
def elementwise_loss(op: Op, maps: Maps) -> Local | list[Node]:
    given = arguments(op, _ELEMENTWISE[op.name], reduction="mean")
    how = _reduction(given)
    if how == "none":
        return elementwise(op, maps)
    shapes = [maps.shape(v) for v in op.inputs]
    output = op.outputs[0]
    each = maps.new_value(torch.broadcast_shapes(*shapes), like=output)
    kwargs = {n: v for n, v in given.items() if v is not None and n not in ("size_average", "reduce")}
    own = Op(op.func, op.name, (), {**kwargs, "reduction": "none"}, op.inputs, (each,), (), op.module)
    made = elementwise(own, maps)
    made = made if isinstance(made, list) else [made]
    weight = given["weight"].value if isinstance(given.get("weight"), Ref) else None
    if how == "mean" and weight is not None and op.name in ("mse_loss", "l1_loss"):
        total, count = maps.new_value(like=output), maps.new_value(like=output)
        weights = _total(op, maps, weight, count) if weight in maps else vector((weight,), count, torch.sum)
        return [*made, _total(op, maps, each, total), weights, vector((total, count), output, torch.div)]
    counts = {"sum": 1, "mean": math.prod(maps.shape(each)), "batchmean": maps.shape(given["input"].value)[0]}
    return [*made, _total(op, maps, each, output, counts[how])]


@rule("cross_entropy", "nll_loss")
def class_loss(op: Op, maps: Maps) -> Local | list[Node]:
    """Loss of class indices, or (cross_entropy) probabilities, for each pixel; classes are dimension 1."""
    given = arguments(op, _CLASSES, ignore_index=-100, reduction="mean", label_smoothing=0.0)
    value, target = given["input"].value, given["target"].value
    weight = given["weight"].value if isinstance(given["weight"], Ref) else None
    if value not in maps or target not in maps:
        raise Refusal(f"'{op.name}' needs labels that are read by region; give them to dense_loss")
    soft = maps.shape(value) == maps.shape(target)
    axes = axes_after(maps.axes[value], (1,), False)
    if 1 in maps.axes[value] or maps.axes[target] != (maps.axes[value] if soft else axes):
        raise Refusal(f"'{op.name}' needs labels with the same image axes as the classes")
    if maps.extent(value) != maps.extent(target):
        raise Refusal(f"'{op.name}' combines maps of different sizes, {maps.extent(value)} and {maps.extent(target)}")
    how, ignored = _reduction(given), given["ignore_index"]
    options = {"label_smoothing": given["label_smoothing"]} if op.name == "cross_entropy" else {}
    options |= {} if soft else {"ignore_index": ignored}
    output = op.outputs[0]
    shape = [n for d, n in enumerate(maps.shape(value)) if d != 1]
    each = output if how == "none" else maps.new_value(shape, like=output)

    def losses(env: Env, _block: Block) -> tuple[Tensor, ...]:
        w = None if weight is None else env[weight]
        return (op.func(env[value], env[target], weight=w, reduction="none", **options),)

    local = _made(op, maps, (value, target), (weight,), each, axes, losses)
    if how == "none":
        return local
    if how == "sum" or soft:
        return [local, _total(op, maps, each, output, math.prod(shape) if how == "mean" else 1)]
    wide = exact(maps.program.values[value].device)
    counted = maps.new_value(shape, wide, like=output)
    total, count = maps.new_value(like=output), maps.new_value(dtype=wide, like=output)

    def counts(env: Env, _block: Block) -> tuple[Tensor, ...]:
        labels = env[target]
        counts_label = labels != ignored
        if weight is None:
            return (counts_label.to(wide),)
        return (torch.where(counts_label, env[weight].to(wide)[torch.where(counts_label, labels, 0).long()], 0),)

    dtype = maps.program.values[output].dtype
    return [
        local,
        _total(op, maps, each, total),
        _made(op, maps, (target,), (weight,), counted, axes, counts),
        _total(op, maps, counted, count),
        vector((total, count), output, lambda t, n: (t.to(wide) / n).to(dtype)),
    ]


def _made(
    op: Op, maps: Maps, reads: tuple[int, ...], vectors: tuple[int | None, ...], output: int, axes: Axes, run: Any
) -> Local:
    """A per-pixel local op whose result has other dimensions than its inputs."""
    given = (*reads, *(v for v in vectors if v is not None))
    own = part_of(op, f"{op.name}_each", given, (output,))
    return Local(own, {v: maps.pointwise(v) for v in reads}, (axes,), run)


@rule("written")
def written(op: Op, maps: Maps) -> Reduction:
    """A map whose blocks are written out as they are made (`dense.write_map`); none of it is stored."""
    value = op.inputs[0]
    if value in maps.flat:
        raise Refusal("cannot write an output whose image axes are flattened into one; return it with both")
    return Reduction(op, value, "sum", 1, (), True, form=lambda block: block.new_zeros(0, dtype=torch.float32))
