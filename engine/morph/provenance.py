"""One run of a network's unmodified forward under a TorchFunctionMode that labels every element it computes.

`Tracer` knows the meaning of the ops; what is done with the labels is left to its two subclasses, `Discover` (the
parent: which channels belong together, record of all values) and `Rebuild` (the child: is every value a copy of the
parent's?). Data movement needs no meaning: the very op is run on the labels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ..capture.trace import module_paths, refuse_custom_functions
from ..errors import MorphError
from . import families
from .families import op_name, reads_no_values
from .lookup import Table


class Mismatch(Exception):
    """A value of the child is no copy of a parent's value; `vids` are what the failing op read."""

    def __init__(self, message: str, vids: list[Tensor] | None = None):
        super().__init__(message)
        self.vids = vids or []


class Fault(MorphError):
    """Following an op failed, not the op: an error of this engine, which must not pass for one of the network."""


@dataclass(slots=True)
class Label:
    """Of one tensor: a value number per element and, in the parent, an atom per element (same shape)."""

    vids: Tensor
    atoms: Tensor | None
    version: int = 0
    parameter: str | None = None  # name, if the tensor is the parameter or buffer itself


@dataclass(slots=True)
class Entry:
    """One op of the parent's log, and what its primitive steps left for the child's run."""

    name: str
    scalars: list[Any]
    where: str
    structure: TreeSpec | None = None
    outputs: list[tuple[tuple[int, ...], torch.dtype] | None] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)  # outputs that are no tensors
    plain: bool = False  # one output, of the operands' broadcast shape
    in_place: int | None = None  # which of the tensors among the arguments is the result
    steps: list[Any] = field(default_factory=list)


class Tracer(TorchFunctionMode):
    """Base of both runs: labels, the dispatch by op family, the refusals."""

    real = True  # whether outputs are computed

    def __init__(self, model: nn.Module, table: Table):
        self.model = model
        self.table = table
        self.path: list[str] = []
        self.where_now = "the model"
        self.latest: list[Tensor] = []  # vids that the latest op read
        self.failed: Exception | None = None  # what the latest op that failed raised
        self.names: dict[int, str] = {}
        for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
            if t.is_floating_point():
                self.names.setdefault(id(t), name)
        self.parameters: dict[str, Label] = {}
        self.followed_parameters: set[str] = {""}  # "": tensors that are none; the weights of linear ops are not in it
        plain = [v for m in model.modules() for k, v in vars(m).items() if k not in _STORES and _full(v)]
        self.held = {id(t) for t in [*tree_flatten(plain)[0], *model.parameters(), *model.buffers()]}

    # ---------------------------------------------------------------- labels

    def where(self) -> str:
        return f"module '{self.path[-1]}'" if self.path and self.path[-1] else "the model"

    def set_label(self, tensor: Tensor, label: Label) -> None:
        label.version = tensor._version
        tensor._morph_label = label  # pyright: ignore[reportAttributeAccessIssue]

    def label(self, tensor: Tensor) -> Label | None:
        """The tensor's label; None for a constant."""
        if id(tensor) in self.names:
            name = self.names[id(tensor)]
            if name not in self.parameters:
                self.parameters[name] = self.parameter_label(name, tensor)
            return self.parameters[name]
        label: Label | None = getattr(tensor, "_morph_label", None)
        if label is not None and label.version != tensor._version:
            raise MorphError(
                f"{self.where()} reads a tensor that was changed in place through another view of it; "
                "write that change out of place"
            )
        return label

    def followed(self, tensor: Tensor) -> bool:
        """Whether the tensor is a parameter or comes from the inputs or parameters."""
        return id(tensor) in self.names or hasattr(tensor, "_morph_label")

    def need(self, tensor: Tensor) -> Label:
        """The tensor's label, for a constant by its values."""
        label = self.label(tensor)
        if label is not None:
            return label
        if id(tensor) not in self.held and not getattr(tensor, "_morph_constant", False):
            raise MorphError(
                f"{self.where()} uses a tensor that was made outside of any recorded call (scripted or "
                "custom code?); give the plain eager module"
            )
        return self.constant_label(tensor)

    def weight(self, tensor: Tensor) -> Label:
        """A label for the weight of a linear op, whose elements are not followed unless it is computed."""
        name = self.names.get(id(tensor))
        return self.need(tensor) if name is None else Label(torch.empty(0, dtype=torch.int64), None, parameter=name)

    # What the subclasses do with labels.

    def parameter_label(self, name: str, tensor: Tensor) -> Label:
        raise NotImplementedError

    def constant_label(self, tensor: Tensor) -> Label:
        raise NotImplementedError

    def constant_vid(self, value: float) -> int:
        raise NotImplementedError

    def begin(self, name: str, scalars: list[Any]) -> Entry:
        raise NotImplementedError

    def elementwise(self, labels: list[Label]) -> Label:
        """A function of the elements at the same broadcast position."""
        raise NotImplementedError

    def rows(self, label: Label, axes: list[int], outputs: list[tuple[int, ...]] | None, keeps: bool) -> list[Label]:
        """A function of each slab along `axes`; `keeps`: the output has as many axes as the input."""
        raise NotImplementedError

    def statistic(self, label: Label, axes: list[int], extreme: bool) -> Label:
        """A mean-like function (or extreme) of the multiset of each slab along `axes`; they are kept with size 1."""
        raise NotImplementedError

    def linear(self, name: str, label: Label, axis: int, kind: tuple[bool, int, tuple[int, ...]]) -> Label:
        """Linear op of parameter `name` on channel `axis`; `kind`: transposed, groups, the parent's output shape."""
        raise NotImplementedError

    def barrier(self, labels: list[Label], outputs: list[tuple[int, ...]], why: str) -> list[Label]:
        """Any function at all of the very same values."""
        raise NotImplementedError

    def pick(self, name: str, label: Label, results: list[Label]) -> None:
        """After data movement that picks by fixed indices."""

    # ---------------------------------------------------------------- dispatch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._follow(func, args, kwargs or {})
        except (Mismatch, MorphError):
            raise
        except Exception as error:
            if error is self.failed:
                raise
            text = (str(error).splitlines() or [""])[0]
            raise Fault(
                f"{self.where_now} could not be followed: {type(error).__name__} {text}; report this"
            ) from error

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The op itself; what it raises is the network's affair."""
        try:
            return func(*args, **kwargs)
        except Exception as error:
            self.failed = error
            raise

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, written = op_name(func)
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [a for a in leaves if isinstance(a, Tensor)]
        if reads_no_values(name) or not any(self.followed(t) for t in tensors):
            result = self.call(func, args, kwargs)
            for t in tree_flatten(result)[0]:
                if isinstance(t, Tensor) and id(t) not in self.held and id(t) not in self.names:
                    t._morph_constant = True  # pyright: ignore[reportAttributeAccessIssue]
            return result
        self.where_now = f"'{name}' in {self.where()}"
        if kwargs.get("out") is not None or name == "data":
            raise MorphError(
                f"{self.where()} uses '{'out=' if name != 'data' else '.data'}', which cannot be followed; "
                "write it out of place"
            )
        if any(
            a.parameter is not None and written.endswith("_") and not written.startswith("__")
            for a in map(self.label, tensors[:1])
            if a
        ):
            raise MorphError(
                f"{self.where()} writes to the parameter or buffer in place during eval; this cannot be followed"
            )
        self.latest = [
            label.vids
            for t in tensors
            if self.names.get(id(t), "") in self.followed_parameters and (label := self.label(t))
        ]
        if name in families.DROPOUT and not kwargs.get("training", args[2] if len(args) > 2 else True):
            return args[0] if args else kwargs["input"]
        if name in families.FACTORIES:
            result = self.call(func, args, kwargs)
            result._morph_constant = True
            return result
        if name == "setitem":
            return self._setitem(*args)
        if name == "copy":
            return self._setitem(args[0], ..., args[1])
        if name in families.MOVE:
            return self._move(name, written, func, args, kwargs, tensors)
        return self._compute(name, func, args, kwargs, tensors, leaves)

    def _compute(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], leaves: list[Any]) -> Any:
        scalars = [a for a in leaves if not isinstance(a, Tensor)]
        entry = self.begin(name, scalars)
        linear = name in families.CONVOLUTIONS or name == "linear"
        labels = [self.weight(t) if linear and i == 1 else self.need(t) for i, t in enumerate(tensors)]
        result = None
        if self.real:
            result = self.call(func, args, kwargs)
            flat, entry.structure = tree_flatten(result)
            entry.outputs = [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None for t in flat]
            entry.constants = [None if isinstance(t, Tensor) else t for t in flat]
            entry.plain = len(flat) == 1 and _shape(flat[0]) == _broadcast(labels)
            entry.in_place = next((i for i, t in enumerate(tensors) if len(flat) == 1 and flat[0] is t), None)
        shapes = [o[0] for o in entry.outputs if o is not None]
        out = self._meaning(name, args, kwargs, tensors, labels, shapes, entry.plain)
        return self._finish(entry, result, tensors, out)

    def _finish(self, entry: Entry, result: Any, tensors: list[Tensor], labels: list[Label]) -> Any:
        if not self.real:
            assert entry.structure is not None
            made = iter(labels)
            if entry.in_place is not None:
                target = tensors[entry.in_place]
                if target._version is not None:
                    target.zero_()  # tells the other views that it has changed
                result = target
            else:
                result = tree_unflatten(
                    [
                        c if o is None else torch.zeros(next(made).vids.shape, dtype=o[1])
                        for o, c in zip(entry.outputs, entry.constants, strict=True)
                    ],
                    entry.structure,
                )
        results = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        for t, label in zip(results, labels, strict=True):
            self.set_label(t, Label(label.vids, label.atoms))
        return result

    def _meaning(
        self,
        name: str,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        labels: list[Label],
        shapes: list[Any],
        plain: bool,
    ) -> list[Label]:
        """The labels of an op's outputs."""
        if not shapes:
            return self.barrier(labels, [], f"its values are read by '{name}'")
        value = tensors[0] if tensors else None
        assert value is not None
        one = len(shapes) == 1
        if name in ("max", "min") and len(tensors) == 2 and plain:
            return [self.elementwise(labels)]
        if name == "prelu" and one:
            return [self.elementwise([labels[0], self._channelwise(labels[1], value.ndim)])]
        if name in families.ELEMENTWISE and plain:
            return [self.elementwise(labels)]
        if name in families.CONVOLUTIONS or name == "linear":
            return self._linear(name, args, kwargs, labels, shapes)
        if name in families.SPATIAL or name in families.RESIZE:
            n = families.SPATIAL.get(name, value.ndim - 2)
            return self.rows(labels[0], list(range(value.ndim - n, value.ndim)), shapes, True)
        if name in families.NORMS and len(labels) >= 1:
            return [self._norm(name, args, kwargs, labels[0])]
        if name in families.ROWS and len(tensors) == 1:
            return self._reduce(name, args, kwargs, labels[0], shapes)
        return self.barrier(labels, shapes, f"'{name}' mixes it in a way that is not known to keep copies")

    @staticmethod
    def _channelwise(label: Label, ndim: int) -> Label:
        """A vector (C) as (1, C, 1, ...)."""
        if label.vids.numel() == 1 and label.vids.ndim == 0:
            return label
        shape = (1, -1, *[1] * (ndim - 2)) if ndim > 1 else (-1,)
        return Label(label.vids.reshape(shape), None if label.atoms is None else label.atoms.reshape(shape))

    def _reduce(self, name: str, args: Any, kwargs: Any, label: Label, shapes: list[Any]) -> list[Label]:
        ndim = label.vids.ndim
        axes = _axes(name, args, kwargs, ndim)
        if axes is None:
            axes = list(range(ndim))
        keeps = len(shapes[0]) == ndim
        known = name in families.MEANS or name in families.EXTREMES
        known = known or (name in ("max", "min") and len(shapes) == 1)
        if known and self.spread(label, axes):
            out = self.statistic(label, axes, name not in families.MEANS)
            if not keeps:
                shape = [s for i, s in enumerate(out.vids.shape) if i not in axes]
                out = Label(out.vids.reshape(shape), None if out.atoms is None else out.atoms.reshape(shape))
            return [out]
        return self.rows(label, axes, shapes, keeps)

    def spread(self, label: Label, axes: list[int]) -> bool:
        """Whether channels of the parent lie along these axes; the child's run repeats the parent's answer."""
        raise NotImplementedError

    def agree(self, values: list[Any]) -> None:
        """Plain arguments that must be the same in both runs."""
        raise NotImplementedError

    def size(self, what: str, given: int, wanted: int, label: Label, axis: int) -> None:
        """An argument that goes with the number of channels on an axis, and what it has to be at this width."""
        raise NotImplementedError

    def _norm(self, name: str, args: Any, kwargs: Any, x: Label) -> Label:
        ndim = x.vids.ndim
        given = dict(zip(_NORM_ARGUMENTS[name].split(), args, strict=False)) | kwargs
        sized = ("input", "weight", "bias", "running_mean", "running_var", "num_groups", "normalized_shape")
        self.agree([v for k, v in sorted(given.items()) if k not in sized])
        affine = [self.need(given[k]) for k in ("weight", "bias") if given.get(k) is not None]
        if name in ("batch_norm", "instance_norm"):
            own = bool(given.get("training") if name == "batch_norm" else given.get("use_input_stats", True))
            moments: list[Label] = []
            if own:
                axes = list(range(2, ndim)) if name == "instance_norm" else [0, *range(2, ndim)]
                shape = tuple(1 if i in axes else s for i, s in enumerate(x.vids.shape))
                moments = [_expanded(self.rows(x, axes, [shape], True)[0], x)]
            else:
                moments = [self._channelwise(self.need(given[k]), ndim) for k in ("running_mean", "running_var")]
            return self.elementwise([x, *moments, *(self._channelwise(a, ndim) for a in affine)])
        if name == "group_norm":
            return self._group_norm(x, given["num_groups"], affine)
        axes = list(range(ndim - len(given["normalized_shape"]), ndim))
        for axis, length in zip(axes, given["normalized_shape"], strict=True):
            self.size(f"normalized_shape[{axis - ndim}]", length, x.vids.shape[axis], x, axis)
        if self.spread(x, axes):
            moment = self.statistic(x, axes, False)
        else:
            shape = tuple(1 if i in axes else s for i, s in enumerate(x.vids.shape))
            moment = self.rows(x, axes, [shape], True)[0]
        return self.elementwise([x, _expanded(moment, x), *affine])

    def _group_norm(self, x: Label, groups: int, affine: list[Label]) -> Label:
        batch, channels, *rest = x.vids.shape
        given, groups = groups, self.group_count(channels, groups)
        self.size("num_groups", given, groups, x, 1)
        folded = (batch, groups, channels // groups * math.prod(rest))
        view = Label(x.vids.reshape(folded), None if x.atoms is None else x.atoms.reshape(folded))
        if self.spread(view, [2]):
            moment = self.statistic(view, [2], False)
        else:
            moment = self.rows(view, [2], [(batch, groups, 1)], True)[0]
        moment = Label(moment.vids.expand(folded).reshape(x.vids.shape), x.atoms)
        return self.elementwise([x, moment, *(self._channelwise(a, x.vids.ndim) for a in affine)])

    def group_count(self, channels: int, groups: int) -> int:
        """Number of groups of a group norm at this width."""
        raise NotImplementedError

    def _linear(self, name: str, args: Any, kwargs: Any, labels: list[Label], shapes: list[Any]) -> list[Label]:
        transposed = name.startswith("conv_transpose")
        names = "input weight bias stride padding " + (
            "output_padding groups dilation" if transposed else "dilation groups"
        )
        given = dict(zip(names.split(), args, strict=False)) | kwargs
        weight = self.names.get(id(given["weight"]))
        if weight is None:
            return self.barrier(labels, shapes, f"the weight of '{name}' is computed in the forward")
        plain = {k: v for k, v in given.items() if k not in ("input", "weight", "bias", "groups")}
        self.agree(tree_flatten([plain[k] for k in sorted(plain)])[0])
        x = self.need(given["input"])
        spatial = families.CONVOLUTIONS[name][0] if name != "linear" else 0
        axis = x.vids.ndim - spatial - 1
        kind = (transposed, given.get("groups", 1) if name != "linear" else 1, shapes[0])
        out = self.linear(weight, x, axis, kind)
        if given.get("bias") is not None:
            bias = self.need(given["bias"])
            shape = [1] * out.vids.ndim
            shape[axis] = -1
            atoms = None if bias.atoms is None else bias.atoms.reshape(shape)
            out = self.elementwise([out, Label(bias.vids.reshape(shape), atoms)])
        return [out]

    # ---------------------------------------------------------------- data movement

    def _move(self, name: str, written: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        joins = name in families.JOINS
        labels = {id(t): self.need(t) for t in tensors if joins or t.is_floating_point() or self.followed(t)}
        index = [t for t in tensors if id(t) not in labels]
        result = self.call(func, args, kwargs)
        in_place = any(result is t for t in tensors)
        flat = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        if not joins and (len(labels) > 1 or id(tensors[0]) not in labels):  # an index that the network computes
            shapes = [tuple(t.shape) for t in flat]
            self.begin(name, [])
            outs = self.barrier(list(labels.values()), shapes, "it is indexed by a computed tensor")
            for t, label in zip(flat, outs, strict=True):
                self.set_label(t, label)
            return result
        fill = None
        if name == "pad":
            fill = self.constant_vid(float(_pad_value(args, kwargs)))

        def run(pick: Callable[[Label], Any], kind: str) -> list[Tensor]:
            def swap(leaf: Any) -> Any:
                if isinstance(leaf, Tensor) and id(leaf) in labels:
                    chosen = pick(labels[id(leaf)])
                    return chosen.clone() if in_place else chosen
                return leaf

            new_args, new_kwargs = tree_map(swap, (args, kwargs))
            if name == "pad":
                return [_pad_labels(new_args, new_kwargs, fill if kind == "vids" else None)]
            try:
                out = func(*new_args, **new_kwargs)
            except (RuntimeError, NotImplementedError):  # no kernel for integers
                doubles = tree_map(
                    lambda a: a.double() if isinstance(a, Tensor) and not any(a is i for i in index) else a,
                    (new_args, new_kwargs),
                )
                out = tree_map(lambda t: t.long(), func(*doubles[0], **doubles[1]))
            return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]

        vids = run(lambda label: label.vids, "vids")
        if all(label.atoms is not None for label in labels.values()):
            atoms: list[Any] = run(lambda label: label.atoms, "atoms")
        else:
            atoms = [None] * len(vids)
        made = [Label(v, a) for v, a in zip(vids, atoms, strict=True)]
        if name in families.PICKS or name in families.CHUNKS:
            self.pick(name, next(iter(labels.values())), made)
        for t, label in zip(flat, made, strict=True):
            if id(t) in self.names:
                continue  # e.g. contiguous() of a parameter is the parameter
            if self.label(t) is not None and not in_place and any(t is a for a in tensors):
                continue
            self.set_label(t, label)
        return result

    def _setitem(self, target: Tensor, index: Any, value: Any) -> Any:
        label = self.need(target)
        source = self.need(value) if isinstance(value, Tensor) else None
        self.call(operator.setitem, (target, index, value), {})
        vids = label.vids.clone()
        atoms = None if label.atoms is None else label.atoms.clone()
        if source is not None:
            vids[index] = source.vids
            if atoms is not None:
                assert source.atoms is not None
                atoms[index] = source.atoms
        else:  # the atoms stay: a constant fits any number of copies
            vids[index] = self.constant_vid(float(value))
        if any(isinstance(i, Tensor) and self.label(i) is not None for i in tree_flatten(index)[0]):
            raise MorphError(f"{self.where()} writes to a tensor at computed indices; this cannot be followed")
        self.set_label(target, Label(vids, atoms))
        return target

    # ---------------------------------------------------------------- the run

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run the model under this mode, in eval mode without gradients; errors name the place."""
        training = {m: m.training for m in self.model.modules()}
        self.model.eval()
        try:
            # The outputs of one would look like constants.
            custom = refuse_custom_functions(
                lambda name: MorphError(
                    f"{self.where()} calls the custom autograd.Function '{name}', which cannot be "
                    "followed; use the plain PyTorch form of it"
                )
            )
            with torch.no_grad(), module_paths(self.model, self.path), custom, self:
                return self.model(*inputs)
        finally:
            for m, t in training.items():
                m.training = t


_STORES = ("_parameters", "_buffers", "_modules")
_NORM_ARGUMENTS = {
    "batch_norm": "input running_mean running_var weight bias training momentum eps",
    "instance_norm": "input running_mean running_var weight bias use_input_stats momentum eps",
    "layer_norm": "input normalized_shape weight bias eps",
    "rms_norm": "input normalized_shape weight eps",
    "group_norm": "input num_groups weight bias eps",
}


def _full(value: Any) -> bool:
    """Whether there can be a tensor in it."""
    return not (value is None or isinstance(value, bool | int | float | str) or (isinstance(value, dict) and not value))


def _expanded(small: Label, like: Label) -> Label:
    """A statistic spread over what it was taken from; it belongs to the same channels."""
    return Label(small.vids.expand(like.vids.shape), like.atoms)


def _shape(leaf: Any) -> tuple[int, ...] | str:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else "no tensor"


def _broadcast(labels: list[Label]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.broadcast_shapes(*(label.vids.shape for label in labels)))
    except RuntimeError:
        return None


def _axes(name: str, args: Any, kwargs: Any, ndim: int) -> list[int] | None:
    """The axes of a reduction or scan; None for all."""
    at = {"norm": 2, "normalize": 2, "topk": 2}.get(name, 1)
    given = kwargs.get("dim", kwargs.get("axis", args[at] if len(args) > at else None))
    if given is None and name == "normalize":
        given = 1
    if given is None and name in ("softmax", "log_softmax", "softmin", "topk", "sort", "argsort"):
        given = -1
    if given is None or isinstance(given, bool):
        return None
    axes = [given] if isinstance(given, int) else list(given)
    return sorted(a % ndim for a in axes) if axes else None


def _pad_value(args: Any, kwargs: Any) -> float:
    value = kwargs.get("value", args[3] if len(args) > 3 else None)
    return 0.0 if value is None else value


def _pad_labels(args: Any, kwargs: Any, fill: int | None) -> Tensor:
    """`F.pad` of labels; padding with a constant gives vid `fill` and the neighbour's atom (0 beside channels)."""
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    labels, pad, mode = given["input"], list(given["pad"]), given.get("mode", "constant")
    if mode != "constant":
        return F.pad(labels.double(), pad, mode=mode).long()
    if fill is not None:
        return F.pad(labels, pad, value=fill)
    for i in range(len(pad) // 2):
        axis = labels.ndim - 1 - i
        first = labels.narrow(axis, 0, 1)
        low, high = pad[2 * i], pad[2 * i + 1]
        same = bool((labels == first).all())
        side = first if same else torch.zeros_like(first)
        if low < 0 or high < 0:
            labels = labels.narrow(axis, max(-low, 0), labels.shape[axis] - max(-low, 0) - max(-high, 0))
        repeat = [1] * labels.ndim
        parts = [labels]
        if low > 0:
            repeat[axis] = low
            parts.insert(0, side.repeat(repeat))
        if high > 0:
            repeat[axis] = high
            parts.append(side.repeat(repeat))
        labels = torch.cat(parts, axis)
    return labels


__all__ = ["Entry", "Fault", "Label", "Mismatch", "Tracer"]
