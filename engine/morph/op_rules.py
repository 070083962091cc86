"""Rules of ops on labels in primitive steps: convolutions, norms, reductions, poolings, elementwise functions.

Data movements run themselves on the value numbers and on the atoms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..torch_private import tree_flatten, tree_map
from . import families
from .labels import Label
from .primitives import LinearCall, Primitives, Shape

_NORM_ARGUMENTS = {
    "batch_norm": "input running_mean running_var weight bias training momentum eps",
    "instance_norm": "input running_mean running_var weight bias use_input_stats momentum eps",
    "layer_norm": "input normalized_shape weight bias eps",
    "rms_norm": "input normalized_shape weight eps",
    "group_norm": "input num_groups weight bias eps",
}
_NORM_SIZED = ("input", "weight", "bias", "running_mean", "running_var", "num_groups", "normalized_shape")


@dataclass(frozen=True)
class OpCall:
    """One call of an op: name, arguments, the tensors among them with their labels, and the shapes of the outputs."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    labels: list[Label]
    shapes: list[Shape]
    plain: bool  # whether it has one output of the operands' broadcast shape

    def arguments(self, names: str) -> dict[str, Any]:
        """Return positional and keyword arguments by name."""
        return dict(zip(names.split(), self.args, strict=False)) | self.kwargs


def output_labels(run: Primitives, call: OpCall) -> list[Label]:
    """Return the labels of an op's outputs."""
    name, labels, shapes = call.name, call.labels, call.shapes
    if not shapes:
        return run.barrier(labels, [], f"'{name}' reads its values")
    ndim, one = call.tensors[0].ndim, len(shapes) == 1
    declared = families.DECLARED.get(name)
    elementwise = declared == "elementwise" or name in families.ELEMENTWISE
    if call.plain and (elementwise or (name in ("max", "min") and len(labels) == 2)):
        return [run.elementwise(labels)]
    if declared == "channelwise" and one and len(shapes[0]) == ndim:
        made = run.rows(labels[0], list(range(2, ndim)), shapes, True)
        return [run.elementwise([*made, *(label.as_channels(ndim) for label in labels[1:])])]
    if name == "prelu" and one:
        return [run.elementwise([labels[0], labels[1].as_channels(ndim)])]
    if name in families.CONVOLUTIONS or name == "linear":
        return _linear(run, call)
    if name in families.PRODUCTS:
        made = _product(run, call)
        labels = [run.need(t) for t in call.tensors] if made is None else labels
        return made or run.barrier(labels, shapes, f"'{name}' mixes it in a way that is not known to preserve copies")
    if name == "glu":
        return [_glu(run, call)]
    if name in families.SPATIAL or name in families.RESIZE:
        n = families.SPATIAL.get(name, ndim - 2)
        return run.rows(labels[0], list(range(ndim - n, ndim)), shapes, True)
    if name in families.NORMS:
        return [_norm(run, call)]
    if name in families.ROWS and len(labels) == 1:
        return _reduce(run, call)
    return run.barrier(labels, shapes, f"'{name}' mixes it in a way that is not known to preserve copies")


def _linear(run: Primitives, call: OpCall) -> list[Label]:
    transposed = call.name.startswith("conv_transpose")
    last = "output_padding groups dilation" if transposed else "dilation groups"
    given = call.arguments(f"input weight bias stride padding {last}")
    stored = run.matrix(given["weight"]) if call.name == "linear" else None
    weight, transposed_matrix = stored or (run.stored_name(given["weight"]), False)
    if weight is None:
        return run.barrier(call.labels, call.shapes, f"the weight of '{call.name}' is computed in the forward")
    plain = {k: v for k, v in given.items() if k not in ("input", "weight", "bias", "groups")}
    run.agree(tree_flatten([plain[k] for k in sorted(plain)])[0])
    x = run.need(given["input"])
    spatial = families.CONVOLUTIONS[call.name] if call.name != "linear" else 0
    axis = (x.vids.ndim - spatial - 1) % x.vids.ndim
    groups = given.get("groups", 1) if call.name != "linear" else 1
    out = run.linear(x, LinearCall(weight, axis, transposed or transposed_matrix, groups, call.shapes[0]))
    if given.get("bias") is not None:
        out = run.elementwise([out, run.need(given["bias"]).on_axis(axis, out.vids.ndim)])
    return [out]


def _product(run: Primitives, call: OpCall) -> list[Label] | None:
    """Return the labels of a product with one stored matrix; None for any other product."""
    tensors = call.tensors[::-1] if call.name == "rmatmul" else call.tensors
    if call.name == "einsum":
        return _einsum(run, call)
    *bias, left, right = tensors
    if len(bias) != (call.name == "addmm"):
        return None
    for x, matrix, first in ((left, right, False), (right, left, True)):
        stored = run.matrix(matrix)
        if stored is None or run.matrix(x) is not None:
            continue
        label, (weight, transposed_matrix) = run.need(x), stored
        axis = max(label.vids.ndim - (2 if first else 1), 0)
        out = run.linear(
            label, LinearCall(weight, axis, transposed_matrix if first else not transposed_matrix, 1, call.shapes[0])
        )
        return [run.elementwise([out, *(run.need(b) for b in bias)]) if bias else out]
    return None


def _einsum(run: Primitives, call: OpCall) -> list[Label] | None:
    """Return the labels of `...c,oc->...o` in any axis order: a stored matrix contracts one axis of a map."""
    text = call.args[0]
    position = next((i for i, t in enumerate(call.tensors) if run.matrix(t) is not None), None)
    if not isinstance(text, str) or "->" not in text or len(call.tensors) != 2 or position is None:
        return None
    if run.matrix(call.tensors[1 - position]) is not None:
        return None
    label = run.need(call.tensors[1 - position])
    left, out = text.replace(" ", "").split("->")
    subscripts = left.split(",")
    w, x = subscripts[position], subscripts[1 - position]
    if "..." in x + out:
        rest = "".join(chr(0x3B1 + i) for i in range(label.vids.ndim - len(x.replace("...", ""))))
        x, out = x.replace("...", rest), out.replace("...", rest)
    summed, new = [c for c in w if c in x], [c for c in w if c not in x]
    if len(w) != 2 or len(set(x)) != len(x) or len(summed) != 1 or len(new) != 1:
        return None
    moved = x.replace(summed[0], new[0])
    if sorted(moved) != sorted(out):
        return None
    weight, transposed_matrix = run.matrix(call.tensors[position]) or ("", False)
    shape = tuple(call.shapes[0][out.index(c)] for c in moved)
    linear = LinearCall(weight, x.index(summed[0]), (w.index(new[0]) == 1) != transposed_matrix, 1, shape)
    made = run.linear(label, linear)
    order = [moved.index(c) for c in out]
    return [Label(made.vids.permute(order), None if made.atoms is None else made.atoms.permute(order))]


def _glu(run: Primitives, call: OpCall) -> Label:
    (label,) = call.labels
    axis = call.arguments("input dim").get("dim", -1) % label.vids.ndim
    vids = label.vids.chunk(2, axis)
    atoms = [None, None] if label.atoms is None else label.atoms.chunk(2, axis)
    halves = [Label(v, a) for v, a in zip(vids, atoms, strict=True)]
    run.pick("chunk", label, halves)
    return run.elementwise(halves)


def _divided_by_the_number(call: OpCall) -> bool:
    """Return whether a variance is the mean of squares, without a correction."""
    if "correction" in call.kwargs:
        return call.kwargs["correction"] == 0
    flags = [a for a in call.args[1:3] if isinstance(a, bool)]
    return call.kwargs.get("unbiased", flags[0] if flags else True) is False


def _reduce(run: Primitives, call: OpCall) -> list[Label]:
    (label,), name = call.labels, call.name
    ndim = label.vids.ndim
    axes = _axes(call, ndim)
    keeps = len(call.shapes[0]) == ndim
    known = name in (*families.MEANS, *families.EXTREMES, "max", "min")
    variance = name in families.VARIANCES and _divided_by_the_number(call)
    if (known or variance) and run.along_channels(label, axes):
        indices = len(call.shapes) - 1 if known else 0  # extremes also return indices
        made = [run.statistic(label, axes, not (variance or name in families.MEANS)) for _ in call.shapes[indices:]]
        made = [out if keeps else out.reshape([out.vids.shape[a] for a in out.others(axes)]) for out in made]
        return [*made, *(run.indices(label, axes, shape) for shape in call.shapes[1 : 1 + indices])]
    return run.rows(label, axes, call.shapes, keeps)


def _norm(run: Primitives, call: OpCall) -> Label:
    name = call.name
    given = call.arguments(_NORM_ARGUMENTS[name])
    x = run.need(given["input"])
    ndim = x.vids.ndim
    run.agree([v for k, v in sorted(given.items()) if k not in _NORM_SIZED])
    affine = [run.need(given[k]) for k in ("weight", "bias") if given.get(k) is not None]
    if name in ("batch_norm", "instance_norm"):
        own = bool(given.get("training") if name == "batch_norm" else given.get("use_input_stats", True))
        if own:
            axes = list(range(2, ndim)) if name == "instance_norm" else [0, *range(2, ndim)]
            moments = [_moment(run, x, axes, False).spread_over(x)]
        else:
            moments = [run.need(given[k]).as_channels(ndim) for k in ("running_mean", "running_var")]
        return run.elementwise([x, *moments, *(a.as_channels(ndim) for a in affine)])
    if name == "group_norm":
        return _group_norm(run, x, given["num_groups"], affine)
    axes = list(range(ndim - len(given["normalized_shape"]), ndim))
    for axis, length in zip(axes, given["normalized_shape"], strict=True):
        run.size(f"normalized_shape[{axis - ndim}]", length, x.vids.shape[axis], x, axis)
    moment = _moment(run, x, axes, run.along_channels(x, axes))
    return run.elementwise([x, moment.spread_over(x), *affine])


def _group_norm(run: Primitives, x: Label, given: int, affine: list[Label]) -> Label:
    batch, channels, *rest = x.vids.shape
    groups = run.group_count(channels, given)
    run.size("num_groups", given, groups, x, 1)
    folded = (batch, groups, channels // groups * math.prod(rest))
    view = x.reshape(folded)
    moment = _moment(run, view, [2], run.along_channels(view, [2]))
    moment = Label(moment.vids.expand(folded).reshape(x.vids.shape), x.atoms)
    return run.elementwise([x, moment, *(a.as_channels(x.vids.ndim) for a in affine)])


def _moment(run: Primitives, x: Label, axes: list[int], over_channels: bool) -> Label:
    """Label a mean or variance along axes, which get size 1."""
    if over_channels:
        return run.statistic(x, axes, False)
    shape = tuple(1 if i in axes else s for i, s in enumerate(x.vids.shape))
    return run.rows(x, axes, [shape], True)[0]


def _axes(call: OpCall, ndim: int) -> list[int]:
    """Return the axes of a reduction or scan."""
    name = call.name
    at = {"norm": 2, "normalize": 2, "topk": 2}.get(name, 1)
    given = call.kwargs.get("dim", call.kwargs.get("axis", call.args[at] if len(call.args) > at else None))
    if given is None and name == "normalize":
        given = 1
    if given is None and name in ("softmax", "log_softmax", "softmin"):
        given = 0 if ndim in (0, 1, 3) else 1  # PyTorch's default, with a warning
    if given is None and name in ("topk", "sort", "argsort"):
        given = -1
    if given is None or isinstance(given, bool):
        return list(range(ndim))
    axes = [given] if isinstance(given, int) else list(given)
    return sorted(a % ndim for a in axes) or list(range(ndim))


Movement = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # name, function and arguments of a call


def moved_labels(call: Movement, labels: dict[int, Label], in_place: bool, fill: int | None) -> list[Label]:
    """Return the labels of the outputs of a call that moves data.

    Args:
        call: name, function, positional and keyword arguments.
        labels: labels of the moved tensors, by id; other tensors are indices.
        in_place: whether the call changes a tensor.
        fill: the vid of the constant that a pad writes.
    """
    vids = _run(call, {key: label.vids for key, label in labels.items()}, in_place, fill)
    atoms = {key: label.atoms for key, label in labels.items() if label.atoms is not None}
    if len(atoms) < len(labels):
        return [Label(v, None) for v in vids]
    return [Label(v, a) for v, a in zip(vids, _run(call, atoms, in_place, None), strict=True)]


def _run(call: Movement, moved: dict[int, Tensor], in_place: bool, fill: int | None) -> list[Tensor]:
    """Run the call on other tensors, by id of those that they replace."""
    name, func, *arguments = call

    def swap(leaf: Any) -> Any:
        if id(leaf) not in moved:
            return leaf
        return moved[id(leaf)].clone() if in_place else moved[id(leaf)]

    def swap_doubles(leaf: Any) -> Any:
        return moved[id(leaf)].double() if id(leaf) in moved else leaf

    args, kwargs = tree_map(swap, arguments)
    if name == "pad":
        return [pad_labels(args, kwargs, fill)]
    try:
        out = func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):  # the op has no kernel for integers
        args, kwargs = tree_map(swap_doubles, arguments)
        out = tree_map(lambda t: t.long(), func(*args, **kwargs))
    return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]


def pad_value(args: Any, kwargs: Any) -> float:
    """Return the constant that `F.pad` writes."""
    value = kwargs.get("value", args[3] if len(args) > 3 else None)
    return 0.0 if value is None else float(value)


def pad_labels(args: Any, kwargs: Any, fill: int | None) -> Tensor:
    """Apply `F.pad` to labels; constant padding gets vid `fill` and the neighbour's atom (0 next to channels)."""
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    labels, pad, mode = given["input"], list(given["pad"]), given.get("mode", "constant")
    if mode != "constant":
        return F.pad(labels.double(), pad, mode=mode).long()
    if fill is not None:
        return F.pad(labels, pad, value=fill)
    for i in range(len(pad) // 2):
        labels = _pad_atoms(labels, labels.ndim - 1 - i, pad[2 * i], pad[2 * i + 1])
    return labels


def _pad_atoms(atoms: Tensor, axis: int, low: int, high: int) -> Tensor:
    first = atoms.narrow(axis, 0, 1)
    side = first if bool((atoms == first).all()) else torch.zeros_like(first)
    if low < 0 or high < 0:
        atoms = atoms.narrow(axis, max(-low, 0), atoms.shape[axis] - max(-low, 0) - max(-high, 0))
    before, after = (side.repeat_interleave(max(count, 0), axis) for count in (low, high))
    return torch.cat([before, atoms, after], axis)
