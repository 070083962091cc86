"""Hooks that a forward registers on the tensors it makes (`Tensor.register_hook`, `Tensor.retain_grad`).

Such a tensor becomes a result of the program, so that it is there whole, and what reads it reads the very tensor
(`lowering.stages.handed_out`): once per call its hook is registered there, and is given the gradient that stock
PyTorch would give it. Tensors that the hook's function holds are those of the call.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedError
from .call_trees import Ref
from .values import Values

_VALUES = (int, float, complex, str, bytes, type(None), type, types.ModuleType, torch.dtype, torch.device, torch.Size)
_EMPTY = object()  # of a variable that has no value yet


@dataclass
class TensorHook:
    """A hook of each call.

    Attributes:
        value: the tensor that it is registered on.
        hook: the function, taken apart; None where the tensor keeps its gradient instead.
        held: the tensors that the function holds.
        where: module and line, for messages.
    """

    value: int
    hook: Any
    held: list[Ref]
    where: str

    @property
    def tree(self) -> Any:
        return Ref(self.value), self.held

    def apply(self, bind: Callable[[Any], Any], order: HookOrder) -> None:
        """Register it; `bind` puts tensors in the place of `Ref`s, `order` is that of the forward's hooks."""
        tensor, held = bind(self.tree)
        if not tensor.requires_grad:
            return
        if self.hook is None:
            tensor.retain_grad()
        else:
            hook = _built(self.hook, dict(zip(self.held, held, strict=True)))

            def called(grad: Tensor | None) -> Any:
                if grad is None:  # the stage that reads it has none for it: stock's backward would not come here
                    return None
                order.check(self)
                return hook(grad)

            tensor.register_hook(called)


class HookOrder:
    """The order in which the hooks of one forward are called: that of stock PyTorch, of later tensors first."""

    def __init__(self) -> None:
        self._last = -1, 0  # the backward, and the tensor

    def check(self, hook: TensorHook) -> None:
        """Raise an `UnsupportedError` where a later tensor's gradient comes after an earlier one's.

        Where branches are parallel one pass over the tiles may need the one's to find the other's.
        """
        now = torch._C._current_graph_task_id()
        backward, value = self._last
        if now == backward and hook.value > value:
            raise UnsupportedError(
                f"{hook.where} has a hook that would be called after those of earlier tensors, other than in stock "
                "PyTorch; take the gradients by torch.autograd.grad, or those of parallel branches one by one"
            )
        self._last = now, hook.value


@dataclass
class _Function:
    """A function, partial or tuple taken apart."""

    like: Any
    parts: list[Any]


class Registered:
    """The hooks of a recording, until its end says what they hold."""

    def __init__(self, values: Values, was_there: Callable[[Any], bool]):
        self.values, self.was_there = values, was_there
        self._hooks: list[tuple[int, Callable[..., Any], OrderedDict[int, Any], weakref.ref[RemovableHandle], str]] = []
        self._keeping: list[tuple[Tensor, str]] = []

    def register(self, tensor: Tensor, hook: Callable[..., Any]) -> RemovableHandle:
        """`tensor.register_hook(hook)`; the handle takes it back as long as the forward lasts."""
        there: OrderedDict[int, Any] = OrderedDict()
        handle = RemovableHandle(there)
        there[handle.id] = hook
        self._hooks.append((self.values.present(tensor), hook, there, weakref.ref(handle), self.values.where()))
        return handle

    def keep_grad(self, tensor: Tensor) -> None:
        """`tensor.retain_grad()`."""
        self._keeping.append((tensor, self.values.where()))

    def finish(self, leaf: Callable[[Tensor], Ref]) -> list[TensorHook]:
        """The hooks that are left; nothing of the recording is held any more.

        Args:
            leaf: the value of a tensor at the end of the forward.

        Raises:
            UnsupportedError: for handles that are kept, and for functions that hold what the forward has made.
        """
        found = [TensorHook(leaf(tensor).value, None, [], where) for tensor, where in self._keeping]
        for value, hook, there, handle, where in self._hooks:
            if not there:
                continue
            if handle() is not None:
                raise UnsupportedError(
                    f"{where} keeps the handle of a hook on a tensor; the hook ends with the tensor, drop the handle"
                )
            held: dict[Ref, None] = {}
            found.append(TensorHook(value, self._apart(hook, leaf, held, where), list(held), where))
        self._hooks.clear()
        self._keeping.clear()
        return found

    def _apart(
        self, thing: Any, leaf: Callable[[Tensor], Ref], held: dict[Ref, None], where: str, above: tuple[int, ...] = ()
    ) -> Any:
        """A function and what it holds, with `Ref`s in the place of tensors; itself if there are none."""
        if isinstance(thing, Tensor):
            ref = leaf(thing)  # also of a buffer: the network may have another one then
            held[ref] = None
            return ref
        if isinstance(thing, (types.FunctionType, functools.partial)) or type(thing) is tuple:
            contents = _contents(thing) if id(thing) not in above else []
            parts = [self._apart(each, leaf, held, where, (*above, id(thing))) for each in contents]
            same = all(a is b for a, b in zip(parts, contents, strict=True))
            return thing if same else _Function(_emptied(thing, parts), parts)
        is_method = isinstance(thing, (types.MethodType, types.BuiltinFunctionType))
        owner = thing.__self__ if is_method else thing
        known = isinstance(owner, _VALUES) or owner is _EMPTY or self.was_there(owner)
        if known and not isinstance(owner, Tensor):
            return thing
        kind = "tensor" if isinstance(owner, Tensor) else type(owner).__name__
        raise UnsupportedError(
            f"{where} registers a hook on a tensor that holds a {kind} made in the forward; make it in the "
            "constructor, and keep it in an attribute of the module"
        )


def _contents(thing: Any) -> list[Any]:
    """What a function, a partial or a tuple holds, in order."""
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.FunctionType):
        cells = [_content(cell) for cell in thing.__closure__ or ()]
        return [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    return list(thing)


def _emptied(thing: Any, parts: list[Any]) -> Any:
    """What a function, a partial or a tuple is built from again: without what is another one in each call."""
    if isinstance(thing, functools.partial):
        return functools.partial(_content, *[None] * len(thing.args), **dict.fromkeys(thing.keywords))
    if not isinstance(thing, types.FunctionType):
        return ()
    # A variable that holds no tensor stays the same one: the function may assign it.
    old = thing.__closure__ or ()
    cells = (types.CellType() if isinstance(p, (Ref, _Function)) else c for c, p in zip(old, parts, strict=False))
    defaults = (None,) * len(thing.__defaults__ or ())
    like = types.FunctionType(thing.__code__, thing.__globals__, thing.__name__, defaults, tuple(cells))
    like.__kwdefaults__ = dict.fromkeys(thing.__kwdefaults__ or ())
    return like


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _built(thing: Any, tensors: dict[Ref, Tensor]) -> Any:
    """The function again, with tensors in the place of `Ref`s."""
    if isinstance(thing, Ref):
        return tensors[thing]
    if not isinstance(thing, _Function):
        return thing
    like, parts = thing.like, [_built(part, tensors) for part in thing.parts]
    if isinstance(like, tuple):
        return tuple(parts)
    if isinstance(like, functools.partial):
        count = 1 + len(like.args)
        return functools.partial(parts[0], *parts[1:count], **dict(zip(like.keywords, parts[count:], strict=True)))
    old = like.__closure__ or ()
    first, second = len(old), len(old) + len(like.__defaults__)
    cells = tuple(
        types.CellType(new) if isinstance(part, (Ref, _Function)) else cell
        for cell, part, new in zip(old, thing.parts[:first], parts[:first], strict=True)
    )
    made = types.FunctionType(like.__code__, like.__globals__, like.__name__, tuple(parts[first:second]), cells)
    made.__kwdefaults__ = dict(zip(like.__kwdefaults__, parts[second:], strict=True))
    return made
