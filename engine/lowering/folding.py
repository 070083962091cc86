"""Folds frozen BatchNorm into the convolution before it, as a factor and an offset per output channel:

    bn(conv(x, w, b)) = conv(x, w*s, (b - mean)*s + beta),   s = gamma / sqrt(var + eps)

The stage runs one convolution with the folded weights, which are computed once per step. Autograd derives the gradients
of w, gamma and beta from those of the folded weights. The convolution's raw output is never stored.

A `Fold` does this for one convolution in ordinary autograd. On a GPU each of its dozen small ops costs a launch, so
`fold_together` processes all convolutions of a stage: vectors are concatenated, and filters of one shape are rows of
one matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capture.program import Op, Program, Ref, Value
from ..module.first_order import ends_here
from ..torch_private import foreach_copy
from .ops import Env, Local, VectorOp
from .ops.base import arguments, batch_norm_arguments
from .stages import ProgramStage, only_readers

_AT_A_TIME = 1 << 20  # bytes of a weight whose gradient is computed at a time


@dataclass(frozen=True)
class Fold:
    """The value numbers of a convolution and a norm; a call returns the folded weight and bias."""

    weight: int
    bias: int | None
    mean: int
    var: int
    gamma: int | None
    beta: int | None
    eps: float
    dtype: torch.dtype

    @property
    def inputs(self) -> tuple[int, ...]:
        every = (self.weight, self.bias, self.mean, self.var, self.gamma, self.beta)
        return tuple(v for v in every if v is not None)

    def factors(self, env: Env) -> tuple[Tensor, Tensor]:
        """A factor for each filter, and the folded bias."""
        wide = torch.promote_types(self.dtype, torch.float32)
        scale = torch.rsqrt(env[self.var].to(wide) + self.eps)
        if self.gamma is not None:
            scale = scale * env[self.gamma].to(wide)
        offset = -env[self.mean].to(wide)
        if self.bias is not None:
            offset = offset + env[self.bias].to(wide)
        offset = offset * scale
        if self.beta is not None:
            offset = offset + env[self.beta].to(wide)
        return scale, offset.to(self.dtype)

    def __call__(self, env: Env) -> tuple[Tensor, Tensor]:
        scale, offset = self.factors(env)
        return Scaled.apply(env[self.weight], scale), offset  # pyright: ignore[reportReturnType]


class Scaled(torch.autograd.Function):
    """`w * s`, a factor for each filter.

    A step ends with these gradients, convolution by convolution. The memory of the tiles is then free but not returned
    to the system, so the backward needs little memory in addition to its results, in autograd's memory order.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(w, scale)
        ctx.set_materialize_grads(False)
        return (w.to(scale.dtype) * scale.reshape(-1, 1, 1, 1)).to(w.dtype)

    @staticmethod
    @ends_here
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore
        if grad is None:
            return None, None
        w, scale = ctx.saved_tensors
        of_w, of_scale = ctx.needs_input_grad
        dw = torch.empty_like(w) if of_w else None
        slope = torch.empty_like(scale) if of_scale else None
        filters = max(1, _AT_A_TIME // max(1, w[0].nbytes)) if len(w) else 1
        for n in range(0, len(w), filters):
            here = slice(n, n + filters)
            rows = torch.empty_like(w[here], dtype=scale.dtype).copy_(grad[here])
            if slope is not None:
                slope[here] = (rows * w[here]).sum((1, 2, 3))
            if dw is not None:
                dw[here] = rows.mul_(scale[here].reshape(-1, 1, 1, 1))
        return dw, slope

    @staticmethod
    def inputs_of(node: Any, _output: int) -> list[Any]:
        """The edges of this function's node along which the gradient of its output continues."""
        return list(node.next_functions)


def fold_batch_norm(stage: ProgramStage) -> None:
    """Fold every frozen BatchNorm that is the only reader of a convolution into that convolution."""
    readers = only_readers(stage)
    makers = {local.op.outputs[0]: local for local in stage.locals if local.op.name == "conv2d"}
    dropped: set[int] = set()
    for norm in list(stage.locals):
        if norm.op.name != "batch_norm":
            continue
        given = batch_norm_arguments(norm.op)
        raw = given["input"].value
        conv = makers.get(raw)
        if conv is not None and raw in readers:
            dropped.add(id(norm))
            _fold(stage, conv, norm, given)
    stage.locals = [local for local in stage.locals if id(local) not in dropped]


def _fold(stage: ProgramStage, conv: Local, norm: Local, given: dict[str, Any]) -> None:
    values = stage.program.values
    fold = _fold_of(values, arguments(conv.op, "input weight bias stride padding dilation groups"), given)
    weight, mean = fold.weight, fold.mean
    folded_weight, folded_bias = len(values), len(values) + 1
    values.append(values[weight])
    values.append(Value(values[mean].shape, values[weight].dtype, values[weight].device))
    stage.prelude.append(VectorOp(fold, fold.inputs, (folded_weight, folded_bias)))
    stage.change_arguments(conv, weight=Ref(folded_weight), bias=Ref(folded_bias))
    conv.op = replace(conv.op, outputs=norm.op.outputs)


def _fold_of(values: Sequence[Value], conv: dict[str, Any], norm: dict[str, Any]) -> Fold:
    """The fold of a convolution and a norm, given the arguments of both."""
    weight, mean, var = conv["weight"].value, norm["running_mean"].value, norm["running_var"].value
    bias, gamma, beta = (None if ref is None else ref.value for ref in (conv["bias"], norm["weight"], norm["bias"]))
    return Fold(weight, bias, mean, var, gamma, beta, norm["eps"], values[weight].dtype)


FOLDED = Ref(-1), Ref(-2)  # the folded weight and bias in an op of `folded_ops`


def folded_ops(program: Program) -> list[tuple[Op, Fold | None]]:
    """The ops of a program without the frozen norms that are folded, each convolution with its `Fold`."""
    kept, state = set(program.results()), set(program.state())
    makers = {op.outputs[0]: n for n, op in enumerate(program.ops) if op.name == "conv2d"}
    readers = Counter(v for op in program.ops for v in op.inputs)
    found: list[tuple[Op, Fold | None] | None] = [(op, None) for op in program.ops]
    for n, norm in enumerate(program.ops):
        given = batch_norm_arguments(norm) if norm.name == "batch_norm" else {"training": True}
        raw = norm.inputs[0] if norm.inputs else -1
        if given["training"] or given["running_mean"] is None or raw not in makers or readers[raw] > 1 or raw in kept:
            continue
        conv = program.ops[makers[raw]]
        own = arguments(conv, "input weight bias stride padding dilation groups")
        fold = _fold_of(program.values, own, given)
        batched = len(program.values[raw].shape) == 4
        if conv.autocast != norm.autocast or norm.mutated or not batched or not state.issuperset(fold.inputs[1:]):
            continue
        changed = {name: value for name, value in own.items() if value is not None}
        changed |= dict(zip(("weight", "bias"), FOLDED, strict=True))
        inputs = own["input"].value, *fold.inputs, *(ref.value for ref in FOLDED)
        found[makers[raw]] = replace(conv, args=(), kwargs=changed, inputs=inputs, outputs=norm.outputs), fold
        found[n] = None
    return [one for one in found if one is not None]


# -- all of a stage at once ---------------------------------------------------------------------------------------


def fold_together(folds: Sequence[VectorOp], env: Env) -> dict[int, Tensor]:
    """The outputs of these ops, each a `Fold`, by value number."""

    def form(op: VectorOp) -> tuple[Any, ...]:
        run: Any = op.run
        vectors = (run.bias, run.mean, run.var, run.gamma, run.beta)
        kinds = (None if v is None else str(env[v].dtype) for v in vectors)
        weight = env[run.weight]
        return str(weight.dtype), run.eps, *(kind or "" for kind in kinds), str(weight.device), tuple(weight.shape[1:])

    found: dict[int, Tensor] = {}
    for _, group in groupby(sorted(folds, key=form), key=lambda op: form(op)[:-1]):
        ops = list(group)
        runs: list[Any] = [op.run for op in ops]
        columns = [[getattr(run, name) for run in runs] for name in ConvTensors._fields]
        parts = ConvTensors(*(tuple(env[v] for v in column) if None not in column else () for column in columns))
        flat = [t for column in parts for t in column]
        made = Folded.apply(len(ops), [bool(column) for column in parts], runs[0].eps, *flat)
        for op, weight, bias in zip(ops, made[: len(ops)], made[len(ops) :], strict=True):  # pyright: ignore
            found.update(zip(op.outputs, (weight, bias), strict=True))
    return found


class ConvTensors(NamedTuple):
    """Tensors of several convolutions by role, one per convolution; an empty tuple for an absent role."""

    weight: tuple[Tensor, ...]
    mean: tuple[Tensor, ...]
    var: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    gamma: tuple[Tensor, ...]
    beta: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], count: int, present: Sequence[bool]) -> ConvTensors:
        left = list(tensors)
        return cls(*(tuple(left.pop(0) for _ in range(count)) if part else () for part in present))


class Folded(torch.autograd.Function):
    """(weights and vectors of several convolutions and norms) -> (folded weights, folded biases).

    Convolutions with filters of one shape are neighbours. The inputs of a convolution have no gradient if its outputs
    have none, as if each convolution were a separate function (`inputs_of`).
    """

    @staticmethod
    def forward(ctx: Any, count: int, present: list[bool], eps: float, *tensors: Tensor):
        parts = ConvTensors.of(tensors, count, present)
        _, scale, distance = _factors(parts, eps)
        offset = distance * scale
        if parts.beta:
            offset += _flat(parts.beta, scale.dtype)
        sizes = [len(w) for w in parts.weight]
        weights: list[Tensor] = []
        for members, channels in _alike(parts.weight):
            own = parts.weight[members]
            rows = torch.cat(own).to(scale.dtype).mul_(scale[channels].reshape(-1, 1, 1, 1)).to(own[0].dtype)
            rows = rows.contiguous(memory_format=torch.channels_last)  # the memory order of maps
            weights += rows.split(sizes[members])
        biases = offset.to(parts.weight[0].dtype).split(sizes)
        wants = ConvTensors.of(ctx.needs_input_grad[3:], count, present)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.form = count, present, eps
        still = [n for n in range(count) if not any(column[n] for column in wants if column)]
        ctx.mark_non_differentiable(*(made[n] for n in still for made in (weights, biases)))
        return *weights, *biases

    @staticmethod
    @ends_here
    def backward(ctx: Any, *grads: Tensor | None):
        count, present, eps = ctx.form
        parts, wants = (ConvTensors.of(t, count, present) for t in (ctx.saved_tensors, ctx.needs_input_grad[3:]))
        reached = [any(grad is not None for grad in grads[n::count]) for n in range(count)]
        rstd, scale, distance = _factors(parts, eps)
        found: dict[str, Sequence[Tensor]] = {"weight": []}
        slope = torch.zeros_like(scale)  # the gradient of `scale`
        for members, channels in _alike(parts.weight):
            own = parts.weight[members]
            given = [torch.zeros_like(w) if g is None else g for w, g in zip(own, grads[members], strict=True)]
            rows = torch.cat(given).to(scale.dtype)
            if any((*wants.gamma, *wants.var)):
                slope[channels] = (rows * torch.cat(own)).sum((1, 2, 3))
            rows.mul_(scale[channels].reshape(-1, 1, 1, 1))
            found["weight"] = [*found["weight"], *_like(own, rows)]
        given = [torch.zeros_like(m) if g is None else g for m, g in zip(parts.mean, grads[count:], strict=True)]
        dbias = _flat(given, scale.dtype)
        slope.addcmul_(dbias, distance)
        found["beta"], found["bias"] = _like(parts.beta, dbias), _like(parts.bias, dbias * scale)
        found["gamma"] = _like(parts.gamma, slope * rstd)
        if any((*wants.mean, *wants.var)):
            gamma = _flat(parts.gamma, scale.dtype) if parts.gamma else 1.0
            found["mean"] = _like(parts.mean, -dbias * scale)
            found["var"] = _like(parts.var, slope * gamma * rstd**3 * -0.5)
        results: list[Tensor | None] = []
        for name, column in zip(ConvTensors._fields, wants, strict=True):
            results += [found[name][n] if want and reached[n] else None for n, want in enumerate(column)]
        return None, None, None, *results

    @staticmethod
    def inputs_of(node: Any, output: int) -> list[Any]:
        """The edges of this function's node along which the gradient of an output continues."""
        count, present, _ = node.form
        return [node.next_functions[part * count + output % count] for part in range(sum(present))]


def _factors(parts: ConvTensors, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """For all channels: 1 / sqrt(var + eps), that times gamma, and the bias minus the mean."""
    wide = torch.promote_types(parts.weight[0].dtype, torch.float32)
    rstd = torch.rsqrt(_flat(parts.var, wide) + eps)
    scale = rstd * _flat(parts.gamma, wide) if parts.gamma else rstd
    distance = -_flat(parts.mean, wide)
    return rstd, scale, distance + _flat(parts.bias, wide) if parts.bias else distance


def _flat(vectors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(vectors)).to(dtype)


def _alike(weights: Sequence[Tensor]) -> Iterator[tuple[slice, slice]]:
    """Runs of weights with filters of one shape: their slice among weights, and their filters' among all filters."""
    first = channel = 0
    for _, group in groupby(weights, key=lambda w: w.shape[1:]):
        sizes = [len(w) for w in group]
        yield slice(first, first + len(sizes)), slice(channel, channel + sum(sizes))
        first, channel = first + len(sizes), channel + sum(sizes)


def _like(targets: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The parts of `rows` that belong to tensors, each in new memory with the strides of its tensor."""
    if not targets:
        return []
    made = [torch.empty_like(t) for t in targets]
    dense = targets[0].is_contiguous()
    rows = rows.contiguous(memory_format=torch.contiguous_format if dense else torch.channels_last)
    foreach_copy(made, list(rows.split([len(t) for t in targets])))
    return made
