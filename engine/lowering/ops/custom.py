"""Custom `autograd.Function`s of one map that compute each position by itself, forward and backward.

In addition to the map they may take plain values and tensors without image axes: the strength of a gradient reversal,
or the weight and bias of a norm over the channels. The gradients of such tensors are sums over the image.

Forward and backward are recorded once, on meta tensors, as lists of PyTorch's own ops:

    y  = f(x, w) = op_n(... op_1(x, w))      each op pointwise, or a sum, mean or maximum over no image axis
    dx = b(x, w, y, saved, dy)               likewise, with the gradient that the function defines
    dw = sum over the image of a similar b   so that the sums of the tiles add up

An op may write (`grad[x < 0] = 0`) only to a tensor that the function made; the lists write to a copy of it.

These lists compute each block, so numbers that the function's Python reads from a shape are those of the whole map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...capture.program import Op, Ref, bind
from ...torch_private import TorchDispatchMode, memory_of, tree_leaves, tree_map_only, without_dispatch_modes
from .base import Axes, Block, Env, Local, Maps, Refusal, Whole, rule

_COPIES = frozenset(f"aten::{name}" for name in "clone detach alias _to_copy ones_like zeros_like".split())
_WRITES = frozenset(f"aten::{name}" for name in "masked_fill_ index_put_ fill_ zero_ copy_".split())
_VIEWS = frozenset(f"aten::{name}" for name in "view _unsafe_view expand unsqueeze squeeze permute t".split())
_FOLDS = frozenset(f"aten::{name}" for name in "sum mean amax amin".split())  # over dimensions, all if none is named


@dataclass(frozen=True)
class _Form:
    """Properties of a tensor inside a function.

    Attributes:
        axes: its image axes, counted from its last dimension (-1); empty for a vector.
        summed: whether values of several positions have been added up, so that each tile has a part of the sum.
    """

    axes: tuple[int, ...] = ()
    summed: bool = False


@dataclass(frozen=True)
class _Slot:  # not a tuple: `tree_map` would descend into it
    """Reference to the tensor that a recorded call reads."""

    number: int

    def find(self, tensors: dict[int, Tensor]) -> Tensor:
        return tensors[self.number]


@dataclass(frozen=True)
class _Number:
    """A tensor that PyTorch makes from a Python number, such as the 0 in `grad[x < 0] = 0`."""

    value: float | bool
    dtype: torch.dtype

    def find(self, tensors: dict[int, Tensor]) -> Tensor:
        device = next(iter(tensors.values())).device
        return torch.full((), self.value, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class _OnCopy:
    """An op that writes to its first tensor, applied to a copy of it."""

    func: Callable[..., Tensor]

    def __call__(self, first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.func(first.clone(), *args, **kwargs)


class _Call(NamedTuple):
    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int


class _Recording(TorchDispatchMode):
    """Records the calls of a function; raises `Refusal` at a call that does not compute each position by itself.

    Attributes:
        calls: the calls so far.
        alive: all tensors seen, so that no memory is reused.
        forms: by tensor number.
        others: the memory that no call may write to.
        sums: whether values of several positions may be added up.
    """

    def __init__(self, *known: tuple[Tensor, _Form]):
        super().__init__()
        self.calls, self.alive, self.forms, self.sums = list[_Call](), list[Tensor](), list[_Form](), False
        self.slots: dict[Any, _Slot | _Number] = {}
        for tensor, form in known:
            self.know(tensor, form)
        self.others = {memory_of(tensor) for tensor in self.alive}

    def know(self, tensor: Tensor, form: _Form) -> int:
        self.alive.append(tensor)
        self.slots[_view(tensor)] = _Slot(len(self.forms))
        self.forms.append(form)
        return len(self.forms) - 1

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor that a recorded call has made."""
        slot = self.slots.get(_view(tensor))
        if not isinstance(slot, _Slot):
            raise Refusal("a custom function uses a tensor that is not among its inputs; pass it as an argument")
        return slot.number

    def form(self, tensor: Tensor) -> _Form:
        slot = self.slots[_view(tensor)]
        return self.forms[slot.number] if isinstance(slot, _Slot) else _Form()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, kwargs = func._schema.name, kwargs or {}
        if name == "aten::scalar_tensor":
            self.alive.append(result)
            self.slots[_view(result)] = _Number(args[0], result.dtype)
            return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not isinstance(result, Tensor) or kwargs.get("device") is not None:  # the recording's
            raise Refusal(f"a custom function calls '{name}', which has no rule there")
        if not all(_view(t) in self.slots for t in given):
            raise Refusal("a custom function uses a tensor that is not among its inputs; pass it as an argument")
        swap = tree_map_only(Tensor, lambda t: self.slots[_view(t)], (args, kwargs))
        if func._schema.is_mutable:
            form = self.form(args[0])
            if self._of_each(func, args, given, result) != form or form.summed:
                raise Refusal(f"a custom function calls '{name}', which has no rule there")
            if memory_of(args[0]) in self.others:
                raise Refusal("a custom function writes to its input; clone it first")
            for view in [view for view in self.slots if view[0] == memory_of(result)]:
                del self.slots[view]  # these views see the write, their numbers do not
            self.calls.append(_Call(_OnCopy(func), swap[0], swap[1], self.know(result, form)))
        elif _view(result) not in self.slots:  # a detached tensor has the number of its base
            form = self._of_each(func, args, given, result)
            self.calls.append(_Call(func, swap[0], swap[1], self.know(result, form)))
        return result

    def _of_each(self, func: Any, args: Sequence[Any], given: Sequence[Tensor], result: Tensor) -> _Form:
        """The form of the result of a call that computes each position by itself; other calls raise `Refusal`."""
        name, forms = func._schema.name, [self.form(t) for t in given]
        refusal = Refusal(f"a custom function calls '{name}', which has no rule there")
        axes = next((form.axes for form in forms if form.axes), ())
        if torch.Tag.nondeterministic_seeded in func.tags or not given:
            raise refusal
        if name in _FOLDS:
            return self._folded(name, forms[0], given[0], result, args)
        if name in _VIEWS and not axes:
            return forms[0]
        if name == "aten::index_put_":  # by a mask; other indices are not elementwise
            fits = len(given) == 3 and given[1].dtype == torch.bool and given[1].shape == given[0].shape
            if not fits or given[2].shape != ():
                raise refusal
        elif func._schema.is_mutable and (not name.endswith("_") or result is not given[0]):
            raise refusal
        plain = torch.Tag.pointwise in func.tags or name in _COPIES or name in _WRITES
        if not plain or any(form.summed for form in forms):
            raise refusal
        for tensor, form in zip(given, forms, strict=True):
            own = [a for a in axes if tensor.dim() >= -a and tensor.shape[a] > 1]
            if form.axes != axes and (form.axes or own):  # transposed maps, or one value per row
                raise refusal
        return _Form(axes)

    def _folded(self, name: str, form: _Form, x: Tensor, result: Tensor, args: Sequence[Any]) -> _Form:
        """The form of a sum, mean or maximum."""
        dims = args[1] if len(args) > 1 else None
        over = {d - x.dim() if d >= 0 else d for d in dims or range(x.dim())}
        if result.dim() == x.dim():
            axes = tuple(a for a in form.axes if a not in over)
        else:
            axes = tuple(a + sum(d > a for d in over) for a in form.axes if a not in over)
        summed = form.summed or len(axes) < len(form.axes)
        if summed and (name != "aten::sum" or not self.sums):
            raise Refusal(f"a custom function applies '{name}' over the image")
        return _Form(axes, summed)


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Key of the elements of a tensor in memory; a detached tensor has the key of its base."""
    return memory_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _run(calls: Sequence[_Call], tensors: dict[int, Tensor]) -> dict[int, Tensor]:
    for call in calls:
        args, kwargs = tree_map_only((_Slot, _Number), lambda p: p.find(tensors), (call.args, call.kwargs))
        tensors[call.output] = call.func(*args, **kwargs)
    return tensors


class _Both(NamedTuple):
    """The two lists of calls and the tensor numbers at their ends.

    Attributes:
        saved: tensors of the forward that the backward reads.
        grad: the gradient of the output.
        results: the gradient of each input; None where it has none.
    """

    forward: list[_Call]
    output: int
    saved: list[int]
    backward: list[_Call]
    grad: int
    results: list[int | None]


class _Recorded(torch.autograd.Function):
    """y = f(x, vectors) and its gradients, computed by the lists."""

    @staticmethod
    def forward(ctx: Any, both: _Both, *given: Tensor) -> Tensor:
        tensors = _run(both.forward, dict(enumerate(given)))
        ctx.both = both
        ctx.save_for_backward(*(tensors[n] for n in both.saved))
        return tensors[both.output]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        both: _Both = ctx.both
        tensors = dict(zip(both.saved, ctx.saved_tensors, strict=True))
        found = _run(both.backward, {**tensors, both.grad: grads[0]})
        return None, *(None if number is None else found[number] for number in both.results)


@rule("autograd.Function")
def custom(op: Op, maps: Maps) -> Local:
    refusal = Refusal(f"no exact tile-by-tile rule for '{op.name}' on the image; replace it or report it")
    value = next(v for v in op.inputs if v in maps)
    inputs = (value, *(v for v in op.inputs if v != value))  # Dynamo may order them differently
    info = maps.program.values[value]
    plain = all(isinstance(leaf, int | float | str | Ref | None) for leaf in tree_leaves((op.args, op.kwargs)))
    single = all(v not in maps for v in inputs[1:])
    if not single or not info.dtype.is_floating_point or not plain or len(op.outputs) != 1:
        raise refusal
    axes = tuple(axis - len(info.shape) for axis in maps.axes[value])
    try:
        with torch.inference_mode(False):  # its tensors have no gradients
            both, found = _recorded(op, inputs, maps, axes)
    except Exception:  # whatever it raises on meta tensors
        raise refusal from None

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (_Recorded.apply(both, *(env[v] for v in inputs)),)

    return Local(op, {value: maps.pointwise(value)}, (found,), run)


def _recorded(op: Op, inputs: Sequence[int], maps: Maps, axes: tuple[int, ...]) -> tuple[_Both, Axes]:
    """The lists of a call, and the image axes of its result; the first input is the map."""
    values = [maps.program.values[v] for v in inputs]
    given = [torch.empty(value.shape, dtype=value.dtype, device="meta") for value in values]
    x, *vectors = given
    wanting = [
        x.requires_grad_(),
        *(t.requires_grad_() for t, value in zip(vectors, values[1:], strict=True) if value.takes_grad),
    ]
    forms = [_Form(axes), *(_Form() for _ in vectors)]
    with torch.enable_grad(), _Recording(*zip(given, forms, strict=True)) as seen:
        args, kwargs = bind((op.args, op.kwargs), dict(zip(inputs, given, strict=True)))
        (y,) = op.func(*args, **kwargs)
        if not isinstance(y, Tensor) or any(y is t for t in given) or not y.requires_grad:
            raise Refusal("another result")
        forward, output, form = seen.calls, seen.number(y), seen.form(y)
        seen.calls, made, seen.sums = [], len(seen.forms), True
        with without_dispatch_modes():
            dy = torch.empty(y.shape, dtype=y.dtype, device="meta")
        grad = seen.know(dy, form)
        seen.others = {memory_of(tensor) for tensor in seen.alive}
        grads = torch.autograd.grad(y, wanting, dy, allow_unused=True)
        backward = seen.calls
        for t, d in zip(wanting, grads, strict=True):
            fits = d is not None and seen.form(d) == (_Form(axes) if t is x else _Form(summed=True))
            if (d is not None or t is x) and (not fits or d.dtype != t.dtype):
                raise Refusal("a gradient has another form or dtype than its tensor")
        numbers = {id(t): None if d is None else seen.number(d) for t, d in zip(wanting, grads, strict=True)}
    if not form.axes:
        raise Refusal("another result")
    leaves = [leaf for call in backward for leaf in tree_leaves((call.args, call.kwargs))]
    asked = {leaf.number for leaf in leaves if isinstance(leaf, _Slot)}
    results = [numbers.get(id(t)) for t in given]
    saved = sorted(n for n in {*asked, *results} if n is not None and n < made)
    h, w = form.axes
    return _Both(forward, output, saved, backward, grad, results), (y.dim() + h, y.dim() + w)


@rule("tensor_hook")
def tensor_hook(op: Op, maps: Maps) -> Whole:
    """The output is the first input under a new value number; hooks receive whole gradients."""
    (made,), given = op.outputs, op.inputs[0]
    if given in maps and given in maps.flat:
        raise Refusal("a tensor hook on a flattened map is not supported; register it on a map with both image axes")
    return Whole(op, {made: maps.axes[given]} if given in maps else {})
