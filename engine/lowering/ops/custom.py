"""Custom `autograd.Function`s of one map that are arithmetic on each element, forward and backward.

Besides the map they may take plain values, and tensors of one number without a gradient (the strength of a gradient
reversal).

Both are recorded once, on tensors without values, as lists of PyTorch's own ops:

    y = f(x) = op_n(... op_1(x))             each op pointwise, on tensors of x's shape and single numbers
    dx = b(x, y, saved, dy)                  likewise, whatever the function says that its gradient is

What an op writes to (`grad[x < 0] = 0`) has to be the function's own; the lists write to a copy of it.

A block is computed by these lists, not by the function: what its Python takes from a shape is of the whole map then.
A function that uses anything besides torch (a list, a counter, a closure) may do what no list of ops shows; it is
refused.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ...capture.trace import Op, Ref, bind
from .base import Block, Env, Local, Maps, Refusal, rule

_COPIES = frozenset(f"aten::{name}" for name in "clone detach alias _to_copy ones_like zeros_like view expand".split())
_WRITES = frozenset(f"aten::{name}" for name in "masked_fill_ index_put_ fill_ zero_ copy_".split())
_NAMES_APART = ("LOAD_DEREF", "LOAD_CLOSURE", "IMPORT_NAME", "STORE_GLOBAL", "MAKE_FUNCTION", "LOAD_NAME")


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
    """The pointwise calls on tensors of one shape and single numbers; raises `Refusal` at any other.

    Attributes:
        calls: those made so far.
        count: how many numbers have been given.
        own: the first number that a call may write to; those before are others'.
    """

    def __init__(self, shape: torch.Size, *known: Tensor):
        super().__init__()
        self.shape, self.calls, self.kept, self.count = shape, list[_Call](), list[Tensor](), 0
        self.places: dict[int, _Place | _Number] = {}  # by memory: a tensor that was written to has another number
        for tensor in known:
            self.know(tensor)
        self.own = self.count

    def know(self, tensor: Tensor) -> int:
        self.kept.append(tensor)  # or its memory would be another's
        self.places[_memory(tensor)] = _Place(self.count)
        self.count += 1
        return self.count - 1

    def number(self, tensor: Tensor) -> int:
        """Of a tensor that a recorded call has made."""
        place = self.places.get(_memory(tensor))
        if not isinstance(place, _Place):
            raise Refusal("a custom function with a tensor of its own")
        return place.number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::scalar_tensor":
            self.kept.append(result)
            self.places[_memory(result)] = _Number(args[0], result.dtype)
            return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not self._is_pointwise(func, given, result) or (kwargs or {}).get("device") is not None:  # the recording's
            raise Refusal(f"'{name}' in a custom function")
        if not all(_memory(t) in self.places for t in given):
            raise Refusal("a custom function with a tensor of its own")
        swap = tree_map_only(Tensor, lambda t: self.places[_memory(t)], (args, kwargs or {}))
        if func._schema.is_mutable:
            if self.number(args[0]) < self.own:
                raise Refusal("a custom function that writes to what it is given")
            self.calls.append(_Call(_OnCopy(func), swap[0], swap[1], self.know(result)))
        elif _memory(result) not in self.places:  # a detached tensor is the same one
            self.calls.append(_Call(func, swap[0], swap[1], self.know(result)))
        return result

    def _is_pointwise(self, func: Any, given: Sequence[Tensor], result: Any) -> bool:
        name, tags, shapes = func._schema.name, func.tags, (self.shape, ())
        if name == "aten::index_put_":  # by a mask; positions of another kind are no arithmetic on each element
            fits = len(given) == 3 and given[1].dtype == torch.bool and given[1].shape == self.shape
            if not fits or given[2].shape != ():
                return False
        elif func._schema.is_mutable and (not name.endswith("_") or result is not given[0]):
            return False
        plain = torch.Tag.pointwise in tags or name in _COPIES or name in _WRITES
        chance = torch.Tag.nondeterministic_seeded in tags
        of_shape = isinstance(result, Tensor) and result.shape in shapes
        return plain and not chance and of_shape and all(t.shape in shapes for t in given)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _run(calls: Sequence[_Call], there: dict[int, Tensor]) -> dict[int, Tensor]:
    for call in calls:
        args, kwargs = tree_map_only((_Place, _Number), lambda p: p.find(there), (call.args, call.kwargs))
        there[call.output] = call.func(*args, **kwargs)
    return there


class _Both(NamedTuple):
    """The two lists, and which number is what: `saved` are of the forward and read by the backward."""

    forward: list[_Call]
    output: int
    saved: list[int]
    backward: list[_Call]
    grad: int
    result: int


class _Recorded(torch.autograd.Function):
    """y = f(x, numbers) and its gradient, by the lists."""

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
        dx = _run(both.backward, {**there, both.grad: grads[0]})[both.result]
        return None, dx, *[None] * (len(ctx.needs_input_grad) - 2)


@rule("autograd.Function")
def custom(op: Op, maps: Maps) -> Local:
    refusal = Refusal(f"no exact tile-by-tile rule for '{op.name}' on the image; replace it or report it")
    values = maps.program.values
    value, *numbers = op.inputs
    info = values[value]
    leaves = tree_leaves((op.args[1:], op.kwargs))
    plain = all(isinstance(leaf, int | float | str | Ref | None) for leaf in leaves)
    grads = maps.program.grad and any(values[v].takes_grad for v in numbers)
    single = not grads and all(v not in maps and values[v].shape == () for v in numbers)
    if op.args[0] != Ref(value) or not single or not info.dtype.is_floating_point or not plain or len(op.outputs) != 1:
        raise refusal
    cls: Any = op.func.cls  # pyright: ignore[reportFunctionMemberAccess]
    if not (_of_torch_alone(cls.forward) and _of_torch_alone(cls.backward)):
        raise refusal
    try:
        both = _recorded(op, [(v, values[v].shape, values[v].dtype) for v in op.inputs])
    except Exception:  # whatever it raises on tensors without values
        raise refusal from None

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (_Recorded.apply(both, *(env[v] for v in op.inputs)),)

    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), run)


def _recorded(op: Op, given: Sequence[tuple[int, torch.Size, torch.dtype]]) -> _Both:
    """The lists of a call, of what it takes: value, shape and dtype, the map first."""
    tensors = {value: torch.empty(shape, dtype=dtype, device="meta") for value, shape, dtype in given}
    x, shape, dtype = tensors[given[0][0]].requires_grad_(), *given[0][1:]
    with torch.enable_grad(), _Recording(shape, *tensors.values()) as seen:
        args, kwargs = bind((op.args, op.kwargs), tensors)
        y = op.func(*args, **kwargs)
        if not isinstance(y, Tensor) or y is x or not y.requires_grad:
            raise Refusal("another result")
        forward, output = seen.calls, seen.number(y)
        seen.calls, made = [], seen.count
        with _disable_current_modes():
            dy = torch.empty(shape, dtype=y.dtype, device="meta")
        grad = seen.know(dy)
        seen.own = seen.count
        (dx,) = torch.autograd.grad(y, x, dy)
        backward, result = seen.calls, seen.number(dx)
    if dx.dtype != dtype:
        raise Refusal("a gradient of another dtype")
    asked = {p.number for call in backward for p in tree_leaves((call.args, call.kwargs), _is_place) if _is_place(p)}
    saved = sorted(n for n in asked | {result} if n < made)
    return _Both(forward, output, saved, backward, grad, result)


def _is_place(leaf: Any) -> bool:
    return isinstance(leaf, _Place)


def _of_torch_alone(function: Any) -> bool:
    """Whether a function's code names nothing besides its arguments and torch."""
    if not isinstance(function, FunctionType):
        return False
    for step in dis.get_instructions(function):
        if step.opname in _NAMES_APART:
            return False
        if step.opname == "LOAD_GLOBAL" and function.__globals__.get(step.argval) not in (torch, F):
            return False
    return True
