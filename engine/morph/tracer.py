"""Run of a network's unmodified forward under a TorchFunctionMode that labels every element it computes.

`Tracer` follows the calls, and `op_rules` and `movement` map each call to labels. Two subclasses implement the
primitive steps: `ParentRun` groups channels and records all values, and `ChildCheck` checks that every value of the
child is a copy of one of the parent's.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import MorphError
from ..torch_private import tree_flatten, tree_unflatten, without_torch_functions
from . import families
from .copying import named_tensors
from .example import Inputs
from .families import custom_name, op_name, reads_no_values
from .labels import Label, no_atoms
from .lookup import PositionTable
from .op_rules import OpCall, moved_labels, output_labels, pad_value
from .primitives import Entry, Primitives
from .running import eval_mode, first_line, in_dtype

_STORES = ("_parameters", "_buffers", "_modules")


@contextmanager
def module_paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Maintain `path` as the stack of modules that run their forward in this thread."""
    mine = threading.get_ident()  # the hooks are global to the process
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _args: Any) -> None:
        if threading.get_ident() == mine:
            path.append(names.get(id(module), type(module).__name__))

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        if threading.get_ident() == mine:
            path.pop()

    leaving = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    with nn.modules.module.register_module_forward_pre_hook(enter), leaving:
        yield


class Mismatch(Exception):
    """Error: a value of the child is not a copy of a parent's value; `vids` are the inputs of the failing op."""

    def __init__(self, message: str, vids: list[Tensor] | None = None):
        super().__init__(message)
        self.vids = vids or []


class Fault(MorphError):
    """Error of this engine while it follows an op; it must not be mistaken for an error of the network."""


class Tracer(TorchFunctionMode, Primitives):
    """Base of both runs: it labels tensors, follows calls, and refuses calls that cannot be followed."""

    real = True  # whether the run computes outputs

    def __init__(self, model: nn.Module, table: PositionTable):
        super().__init__()
        self.model = model
        self.table = table
        self.path: list[str] = []
        self.where_now = "the model"
        self.latest: list[Tensor] = []  # vids that the latest op read
        self.failed: Exception | None = None  # the exception of the latest op that failed
        self.names: dict[int, str] = {}
        for name, t in named_tensors(model).items():
            if t.is_floating_point():
                self.names.setdefault(id(t), name)
        self.parameters: dict[str, Label] = {}
        self.followed_parameters: set[str] = {""}  # without weights of linear ops; "" means tensors without a name
        plain = [v for m in model.modules() for k, v in vars(m).items() if k not in _STORES and _full(v)]
        self.held = {id(t) for t in [*tree_flatten(plain)[0], *model.parameters(), *model.buffers()]}

    # ---------------------------------------------------------------- labels

    def where(self) -> str:
        return f"module '{self.path[-1]}'" if self.path and self.path[-1] else "the model"

    def set_label(self, tensor: Tensor, label: Label) -> None:
        label.version = tensor._version
        tensor._morph_label = label  # pyright: ignore[reportAttributeAccessIssue]

    def label(self, tensor: Tensor) -> Label | None:
        """Return the tensor's label; None for a constant."""
        if id(tensor) in self.names:
            name = self.names[id(tensor)]
            if name not in self.parameters:
                self.parameters[name] = self.parameter_label(name, tensor)
            return self.parameters[name]
        label: Label | None = getattr(tensor, "_morph_label", None)
        whole: Tensor | None = getattr(tensor, "_morph_transposed", None)
        if label is None and whole is not None:  # another op than a product reads the transposed weight
            stored = self.need(whole)
            label = Label(stored.vids.t(), None if stored.atoms is None else stored.atoms.t(), tensor._version)
            self.set_label(tensor, label)
        if label is not None and label.version != tensor._version:
            raise MorphError(
                f"{self.where()} reads a tensor that was changed in place through another view of it; "
                "write that change out of place"
            )
        return label

    def followed(self, tensor: Tensor) -> bool:
        """Return whether the tensor is a parameter, or depends on inputs or parameters."""
        return id(tensor) in self.names or hasattr(tensor, "_morph_label") or hasattr(tensor, "_morph_transposed")

    def matrix(self, tensor: Tensor) -> tuple[str, bool] | None:
        whole: Tensor = getattr(tensor, "_morph_transposed", tensor)
        name = self.names.get(id(whole))
        return (name, whole is not tensor) if name is not None and whole.ndim == 2 else None

    def need(self, tensor: Tensor) -> Label:
        """Return the tensor's label; for a constant it is derived from the values."""
        label = self.label(tensor)
        if label is not None:
            return label
        if id(tensor) not in self.held and not getattr(tensor, "_morph_constant", False):
            raise MorphError(
                f"{self.where()} uses a tensor that no recorded call created (scripted or custom code?); give the "
                "plain eager module"
            )
        return self.constant_label(tensor)

    def weight(self, tensor: Tensor) -> Label:
        """Return a label for the weight of a linear op; its elements are followed only if it is computed."""
        name = self.names.get(id(getattr(tensor, "_morph_transposed", tensor)))
        return self.need(tensor) if name is None else Label(torch.empty(0, dtype=torch.int64), None, parameter=name)

    def stored_name(self, tensor: Tensor) -> str | None:
        return self.names.get(id(tensor))

    def constant_label(self, tensor: Tensor) -> Label:
        """Create a label from values."""
        values, inverse = torch.unique(tensor.detach().double().reshape(-1), return_inverse=True)
        vids = torch.tensor([self.constant_vid(v) for v in values.tolist()], dtype=torch.int64)
        return Label(vids[inverse].reshape(tensor.shape), no_atoms(tensor.shape) if self.real else None)

    # ---------------------------------------------------------------- dispatch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            name, written = op_name(func)
            if reads_no_values(name):
                return self._constants(self.call(func, args, kwargs or {}))
            return self._follow(func, args, kwargs or {}, name, written, f"'{name}'")
        except (Mismatch, MorphError):
            raise
        except Exception as error:
            if error is self.failed:
                raise
            text = f"{type(error).__name__} {first_line(error)}"
            raise Fault(f"{self.where_now} could not be followed: {text}; report this") from error

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call the op; its exceptions count as errors of the network."""
        try:
            return func(*args, **kwargs)
        except Exception as error:
            self.failed = error
            raise

    def _follow(self, func: Any, args: Any, kwargs: Any, name: str, written: str, what: str) -> Any:
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [a for a in leaves if isinstance(a, Tensor)]
        if not any(self.followed(t) for t in tensors):
            return self._constants(self.call(func, args, kwargs))
        self.where_now = f"{what} in {self.where()}"
        self._refuse(name, written, kwargs, tensors[0])
        self.latest = [
            label.vids
            for t in tensors
            if self.names.get(id(t), "") in self.followed_parameters
            and not hasattr(t, "_morph_transposed")
            and (label := self.label(t))
        ]
        if name in families.DROPOUT and not kwargs.get("training", args[2] if len(args) > 2 else True):
            return args[0] if args else kwargs["input"]
        if name == "data":
            return self._data(func, args, kwargs, tensors)
        if name in families.FACTORIES:
            return self._constants(self.call(func, args, kwargs))
        if name == "setitem":
            return self._setitem(*args)
        if name == "copy":
            return self._setitem(args[0], ..., args[1])
        if name == "embedding" and (rows := self._looked_up(args, kwargs)):
            return self._move("getitem", operator.getitem, rows, {}, list(rows))
        if name in families.MOVE:
            return self._move(name, func, args, kwargs, tensors)
        return self._compute(name, func, args, kwargs, tensors, leaves)

    def _constants(self, result: Any) -> Any:
        """Mark results that do not depend on inputs or parameters."""
        for t in tree_flatten(result)[0]:
            if isinstance(t, Tensor) and id(t) not in self.held and id(t) not in self.names:
                t._morph_constant = True  # pyright: ignore[reportAttributeAccessIssue]
        return result

    def _refuse(self, name: str, written: str, kwargs: Any, first: Tensor) -> None:
        if kwargs.get("out") is not None:
            raise MorphError(f"{self.where()} uses 'out=', which cannot be followed; write it out of place")
        if not families.writes(written):
            return
        label = self.label(first)
        if getattr(first, "_morph_data", False):
            raise MorphError(
                f"{self.where()} writes to a tensor's '.data', which cannot be followed; write it out of place"
            )
        if label is not None and label.parameter is not None:
            raise MorphError(
                f"{self.where()} writes to the parameter or buffer in place during eval; this cannot be followed"
            )

    def _compute(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], leaves: list[Any]) -> Any:
        scalars = [a for a in leaves if not isinstance(a, Tensor)]
        entry = self.begin(name, scalars)
        weight = self._weight_index(name, tensors)
        labels = [self.weight(t) if i == weight else self.need(t) for i, t in enumerate(tensors)]
        result = None
        if self.real:
            versions = [t._version for t in tensors]
            result = self.call(func, args, kwargs)
            flat, entry.structure = tree_flatten(result)
            entry.outputs = [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None for t in flat]
            entry.constants = [None if isinstance(t, Tensor) else t for t in flat]
            entry.plain = len(flat) == 1 and isinstance(flat[0], Tensor) and flat[0].shape == _broadcast(labels)
            entry.in_place = next((i for i, t in enumerate(tensors) if len(flat) == 1 and flat[0] is t), None)
            entry.changed = entry.in_place is not None and flat[0]._version != versions[entry.in_place]
        shapes = [o[0] for o in entry.outputs if o is not None]
        made = output_labels(self, OpCall(name, args, kwargs, tensors, labels, shapes, entry.plain))
        return self._finish(entry, result, tensors, made)

    def _finish(self, entry: Entry, result: Any, tensors: list[Tensor], labels: list[Label]) -> Any:
        if not self.real:
            assert entry.structure is not None
            made = iter(labels)
            if entry.in_place is not None:
                target = tensors[entry.in_place]
                if entry.changed:
                    target.zero_()  # increases the version counter of the other views
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

    def _weight_index(self, name: str, tensors: list[Tensor]) -> int | None:
        """Return the index of the tensor that is the weight of a linear op, or None."""
        if name in families.CONVOLUTIONS or name == "linear":
            return 1
        if name not in families.PRODUCTS:
            return None
        stored = [i for i, t in enumerate(tensors) if self.matrix(t) is not None]
        return stored[0] if len(stored) == 1 else None

    def _move(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        if name in families.TRANSPOSES and id(tensors[0]) in self.names and _transposes(name, args, tensors[0]):
            result = self.call(func, args, kwargs)
            result._morph_transposed = tensors[0]
            return result
        joins = name in families.JOINS
        labels = {id(t): self.need(t) for t in tensors if joins or t.is_floating_point() or self.followed(t)}
        result = self.call(func, args, kwargs)
        in_place = any(result is t for t in tensors)
        flat = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        if not joins and (len(labels) > 1 or id(tensors[0]) not in labels):  # an index that the network computes
            self.begin(name, [])
            shapes = [tuple(t.shape) for t in flat]
            made = self.barrier(list(labels.values()), shapes, "it is indexed by a computed tensor")
            for t, label in zip(flat, made, strict=True):
                self.set_label(t, label)
            return result
        fill = self.constant_vid(pad_value(args, kwargs)) if name == "pad" else None
        made = moved_labels((name, func, args, kwargs), labels, in_place, fill)
        if name in families.PICKS or name in families.CHUNKS:
            self.pick(name, next(iter(labels.values())), made)
        for t, label in zip(flat, made, strict=True):
            if id(t) in self.names:
                continue  # e.g. contiguous() of a parameter is the parameter
            if self.label(t) is not None and not in_place and any(t is a for a in tensors):
                continue
            self.set_label(t, label)
        return result

    def _looked_up(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """Return table and indices of an embedding that only reads rows; None if they are computed or rescaled."""
        given = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
        if self.followed(given["input"]) or given.get("max_norm") is not None:
            return None
        return given["weight"], given["input"]

    def _data(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Follow `x.data` with frozen channels, because writes to it would not be noticed at `x`."""
        if len(args) > 1:
            raise MorphError(
                f"{self.where()} replaces a tensor's '.data', which cannot be followed; write it out of place"
            )
        result = self._compute("data", func, args, kwargs, tensors, list(args))
        result._morph_data = True
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
        else:  # the atoms do not change, because a constant fits any number of copies
            vids[index] = self.constant_vid(float(value))
        if any(isinstance(i, Tensor) and self.label(i) is not None for i in tree_flatten(index)[0]):
            raise MorphError(f"{self.where()} writes to a tensor at computed indices; this cannot be followed")
        self.set_label(target, Label(vids, atoms))
        return target

    def _custom(self, cls: type, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow a custom autograd.Function; without a declaration it counts as an unknown function."""

        def func(*args: Any, **kwargs: Any) -> Any:
            with without_torch_functions():
                return apply(*args, **kwargs)

        return self._follow(func, args, kwargs, custom_name(cls), "", f"the custom function '{cls.__name__}'")

    # ---------------------------------------------------------------- the run

    def forward(self, inputs: Inputs) -> Any:
        """Run the model under this mode, in eval mode without gradients; errors name the module."""
        custom = _custom_functions(self._custom)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        with eval_mode(self.model), torch.no_grad(), module_paths(self.model, self.path), custom, in_dtype(dtype), self:
            return inputs.call(self.model)


@contextmanager
def _custom_functions(call: Callable[..., Any]) -> Iterator[None]:
    """Redirect custom autograd.Functions, which bypass function modes, to `call(class, apply, args, kwargs)`."""
    original = inspect.getattr_static(torch.autograd.Function, "apply")  # a method in Python, or from 2.14 on in C

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        return call(cls, original.__get__(None, cls), args, kwargs)

    own = vars(torch.autograd.Function).get("apply")
    torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        if own is None:
            del torch.autograd.Function.apply
        else:
            torch.autograd.Function.apply = own


def _full(value: Any) -> bool:
    """Return whether a value may contain a tensor."""
    return not (value is None or isinstance(value, bool | int | float | str) or (isinstance(value, dict) and not value))


def _transposes(name: str, args: tuple[Any, ...], matrix: Tensor) -> bool:
    """Return whether a movement transposes a matrix."""
    if matrix.ndim != 2:
        return False
    axes = tree_flatten(args[1:])[0]
    if name in ("transpose", "swapaxes", "swapdims", "permute"):
        return len(axes) == 2 and axes[0] % 2 != axes[1] % 2 and (name != "permute" or axes[0] % 2 == 1)
    return not axes


def _broadcast(labels: list[Label]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.broadcast_shapes(*(label.vids.shape for label in labels)))
    except RuntimeError:
        return None
