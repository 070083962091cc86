"""Custom `autograd.Function`s of one map that compute each position by itself, forward and backward.

Besides the map they may take plain values, and tensors without image axes: the strength of a gradient reversal, or the
weight and bias of a norm over the channels, whose gradients are sums over the image.

Both are recorded once, on tensors without values, as lists of PyTorch's own ops:

    y  = f(x, w) = op_n(... op_1(x, w))      each op pointwise, or a sum, mean or maximum over no image axis
    dx = b(x, w, y, saved, dy)               likewise, whatever the function says that its gradient is
    dw = sum over the image of such a b      so that those of the tiles add up

What an op writes to (`grad[x < 0] = 0`) has to be the function's own; the lists write to a copy of it.

A block is computed by these lists: what the function's Python takes from a shape is of the whole map then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ...capture.program import Op, Ref, bind
from .base import Axes, Block, Env, Local, Maps, Refusal, rule

_COPIES = frozenset(f"aten::{name}" for name in "clone detach alias _to_copy ones_like zeros_like".split())
_WRITES = frozenset(f"aten::{name}" for name in "masked_fill_ index_put_ fill_ zero_ copy_".split())
_VIEWS = frozenset(f"aten::{name}" for name in "view _unsafe_view expand unsqueeze squeeze permute t".split())
_FOLDS = frozenset(f"aten::{name}" for name in "sum mean amax amin".split())  # over dimensions, all if none is named


@dataclass(frozen=True)
class _Form:
    """What a tensor of a function is.

    Attributes:
        axes: its image axes, counted from its last dimension (-1); those of a vector are none.
        summed: whether values of several positions have been added up, so that a tile has its part of the sum.
    """

    axes: tuple[int, ...] = ()
    summed: bool = False


@dataclass(frozen=True)
class _Place:  # no tuple: those are looked into
    """Where a recorded call takes a tensor from."""

    number: int

    def find(self, there: dict[int, Tensor]) -> Tensor:
        return there[self.number]


@dataclass(frozen=True)
class _Number:
    """A tensor of one number that PyTorch makes of Python's, as of the 0 in `grad[x < 0] = 0`."""

    value: float | bool
    dtype: torch.dtype

    def find(self, there: dict[int, Tensor]) -> Tensor:
        device = next(iter(there.values())).device
        return torch.full((), self.value, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class _OnCopy:
    """An op that writes to its first tensor, done to a copy of it."""

    func: Callable[..., Tensor]

    def __call__(self, first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.func(first.clone(), *args, **kwargs)


class _Call(NamedTuple):
    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int


class _Recording(TorchDispatchMode):
    """The calls of a function, as long as they take each position by itself; raises `Refusal` at any other.

    Attributes:
        calls: those made so far.
        forms: of the numbers that have been given.
        others: the memory that no call may write to.
        sums: whether values of several positions may be added up.
    """

    def __init__(self, *known: tuple[Tensor, _Form]):
        super().__init__()
        self.calls, self.kept, self.forms, self.sums = list[_Call](), list[Tensor](), list[_Form](), False
        self.places: dict[Any, _Place | _Number] = {}
        for tensor, form in known:
            self.know(tensor, form)
        self.others = {_memory(tensor) for tensor in self.kept}

    def know(self, tensor: Tensor, form: _Form) -> int:
        self.kept.append(tensor)  # or its memory would be another's
        self.places[_view(tensor)] = _Place(len(self.forms))
        self.forms.append(form)
        return len(self.forms) - 1

    def number(self, tensor: Tensor) -> int:
        """Of a tensor that a recorded call has made."""
        place = self.places.get(_view(tensor))
        if not isinstance(place, _Place):
            raise Refusal("a custom function with a tensor of its own")
        return place.number

    def form(self, tensor: Tensor) -> _Form:
        place = self.places[_view(tensor)]
        return self.forms[place.number] if isinstance(place, _Place) else _Form()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, kwargs = func._schema.name, kwargs or {}
        if name == "aten::scalar_tensor":
            self.kept.append(result)
            self.places[_view(result)] = _Number(args[0], result.dtype)
            return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not isinstance(result, Tensor) or kwargs.get("device") is not None:  # the recording's
            raise Refusal(f"'{name}' in a custom function")
        if not all(_view(t) in self.places for t in given):
            raise Refusal("a custom function with a tensor of its own")
        swap = tree_map_only(Tensor, lambda t: self.places[_view(t)], (args, kwargs))
        if func._schema.is_mutable:
            form = self.form(args[0])
            if self._of_each(func, args, given, result) != form or form.summed:
                raise Refusal(f"'{name}' in a custom function")
            if _memory(args[0]) in self.others:
                raise Refusal("a custom function that writes to what it is given")
            for view in [view for view in self.places if view[0] == _memory(result)]:
                del self.places[view]  # they have what was written, their numbers have not
            self.calls.append(_Call(_OnCopy(func), swap[0], swap[1], self.know(result, form)))
        elif _view(result) not in self.places:  # a detached tensor is the same one
            form = self._of_each(func, args, given, result)
            self.calls.append(_Call(func, swap[0], swap[1], self.know(result, form)))
        return result

    def _of_each(self, func: Any, args: Sequence[Any], given: Sequence[Tensor], result: Tensor) -> _Form:
        """The form of the result of a call that takes each position by itself."""
        name, forms = func._schema.name, [self.form(t) for t in given]
        refusal = Refusal(f"'{name}' in a custom function")
        axes = next((form.axes for form in forms if form.axes), ())
        if torch.Tag.nondeterministic_seeded in func.tags or not given:
            raise refusal
        if name in _FOLDS:
            return self._folded(name, forms[0], given[0], result, args)
        if name in _VIEWS and not axes:
            return forms[0]
        if name == "aten::index_put_":  # by a mask; positions of another kind are no arithmetic on each element
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
            if form.axes != axes and (form.axes or own):  # maps turned over, a value for each row
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
            raise Refusal(f"'{name}' over the image in a custom function")
        return _Form(axes, summed)


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Which elements of which memory; a detached tensor has those of the one that it is of."""
    return _memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _run(calls: Sequence[_Call], there: dict[int, Tensor]) -> dict[int, Tensor]:
    for call in calls:
        args, kwargs = tree_map_only((_Place, _Number), lambda p: p.find(there), (call.args, call.kwargs))
        there[call.output] = call.func(*args, **kwargs)
    return there


class _Both(NamedTuple):
    """The two lists, and which number is what: `saved` are of the forward and read by the backward.

    `results` has the gradient of each tensor given, None where it has none.
    """

    forward: list[_Call]
    output: int
    saved: list[int]
    backward: list[_Call]
    grad: int
    results: list[int | None]


class _Recorded(torch.autograd.Function):
    """y = f(x, vectors) and its gradients, by the lists."""

    @staticmethod
    def forward(ctx: Any, both: _Both, *given: Tensor) -> Tensor:
        there = _run(both.forward, dict(enumerate(given)))
        ctx.both = both
        ctx.save_for_backward(*(there[n] for n in both.saved))
        return there[both.output]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        both: _Both = ctx.both
        there = dict(zip(both.saved, ctx.saved_tensors, strict=True))
        found = _run(both.backward, {**there, both.grad: grads[0]})
        return None, *(None if number is None else found[number] for number in both.results)


@rule("autograd.Function")
def custom(op: Op, maps: Maps) -> Local:
    refusal = Refusal(f"no exact tile-by-tile rule for '{op.name}' on the image; replace it or report it")
    value = next(v for v in op.inputs if v in maps)
    inputs = (value, *(v for v in op.inputs if v != value))  # what Dynamo hands over may come in another order
    info = maps.program.values[value]
    plain = all(isinstance(leaf, int | float | str | Ref | None) for leaf in tree_leaves((op.args, op.kwargs)))
    single = all(v not in maps for v in inputs[1:])
    if not single or not info.dtype.is_floating_point or not plain or len(op.outputs) != 1:
        raise refusal
    axes = tuple(axis - len(info.shape) for axis in maps.axes[value])
    try:
        with torch.inference_mode(False):  # its tensors have no gradients
            both, found = _recorded(op, inputs, maps, axes)
    except Exception:  # whatever it raises on tensors without values
        raise refusal from None

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (_Recorded.apply(both, *(env[v] for v in inputs)),)

    return Local(op, {value: maps.pointwise(value)}, (found,), run)


def _recorded(op: Op, inputs: Sequence[int], maps: Maps, axes: tuple[int, ...]) -> tuple[_Both, Axes]:
    """The lists of a call, and the image axes of its result; the first of the inputs is the map."""
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
        with _disable_current_modes():
            dy = torch.empty(y.shape, dtype=y.dtype, device="meta")
        grad = seen.know(dy, form)
        seen.others = {_memory(tensor) for tensor in seen.kept}
        grads = torch.autograd.grad(y, wanting, dy, allow_unused=True)
        backward = seen.calls
        for t, d in zip(wanting, grads, strict=True):
            fits = d is not None and seen.form(d) == (_Form(axes) if t is x else _Form(summed=True))
            if (d is not None or t is x) and (not fits or d.dtype != t.dtype):
                raise Refusal("a gradient of another kind")
        numbers = {id(t): None if d is None else seen.number(d) for t, d in zip(wanting, grads, strict=True)}
    if not form.axes:
        raise Refusal("another result")
    asked = {p.number for call in backward for p in tree_leaves((call.args, call.kwargs), _is_place) if _is_place(p)}
    results = [numbers.get(id(t)) for t in given]
    saved = sorted(n for n in {*asked, *results} if n is not None and n < made)
    h, w = form.axes
    return _Both(forward, output, saved, backward, grad, results), (y.dim() + h, y.dim() + w)


def _is_place(leaf: Any) -> bool:
    return isinstance(leaf, _Place)
