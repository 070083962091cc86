"""Hooks that a forward registers on the tensors it makes (`Tensor.register_hook`, `Tensor.retain_grad`).

Such a tensor becomes a result of the program, so that it is there whole, and what reads it reads the very tensor
(`lowering.stages.handed_out`): once per call its hook is registered there, and is given the gradient that stock
PyTorch would give it.
"""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedError
from .program import Ref
from .values import Values

_VALUES = (int, float, complex, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType, torch.dtype)


class TensorHook:
    """A hook of each call.

    Attributes:
        value: the tensor that it is registered on.
        hook: what is called; None where the tensor keeps its gradient instead.
        cells: tensors that the function has in its closure, by the variable's name.
    """

    def __init__(self, value: int, hook: Callable[..., Any] | None = None, cells: Mapping[str, Ref] | None = None):
        self.value, self.hook, self.cells = value, hook, cells or {}

    @property
    def tree(self) -> Any:
        return Ref(self.value), dict(self.cells)

    def apply(self, bind: Callable[[Any], Any]) -> None:
        """Register it; `bind` puts tensors in the place of `Ref`s."""
        tensor, cells = bind(self.tree)
        if not tensor.requires_grad:
            return
        if self.hook is None:
            tensor.retain_grad()
        else:
            tensor.register_hook(_filled(self.hook, cells))


class Registered:
    """The hooks of a recording, until its end says what they hold."""

    def __init__(self, values: Values, was_there: Callable[[Any], bool]):
        self.values, self.was_there = values, was_there
        self._hooks: list[tuple[int, Callable[..., Any], OrderedDict[int, Any], weakref.ref[RemovableHandle], str]] = []
        self._keeping: list[Tensor] = []

    def register(self, tensor: Tensor, hook: Callable[..., Any]) -> RemovableHandle:
        """`tensor.register_hook(hook)`; the handle takes it back as long as the forward lasts."""
        there: OrderedDict[int, Any] = OrderedDict()
        handle = RemovableHandle(there)
        there[handle.id] = hook
        self._hooks.append((self.values.present(tensor), hook, there, weakref.ref(handle), self.values.where()))
        return handle

    def keep_grad(self, tensor: Tensor) -> None:
        """`tensor.retain_grad()`."""
        self._keeping.append(tensor)

    def finish(self, leaf: Callable[[Tensor], Ref]) -> list[TensorHook]:
        """The hooks that are left; nothing of the recording is held any more.

        Args:
            leaf: the value of a tensor at the end of the forward.

        Raises:
            UnsupportedError: for handles that are kept, and for functions that hold what the forward has made.
        """
        found = [TensorHook(leaf(tensor).value) for tensor in self._keeping]
        for value, hook, there, handle, where in self._hooks:
            if not there:
                continue
            if handle() is not None:
                raise UnsupportedError(
                    f"{where} keeps the handle of a hook on a tensor; the hook ends with the tensor, drop the handle"
                )
            found.append(TensorHook(value, *self._emptied(hook, leaf, where)))
        self._hooks.clear()
        self._keeping.clear()
        return found

    def _emptied(
        self, hook: Callable[..., Any], leaf: Callable[[Tensor], Ref], where: str
    ) -> tuple[Callable[..., Any], dict[str, Ref]]:
        """The function without the tensors of its closure, and those."""
        if not isinstance(hook, types.FunctionType):
            self._check(getattr(hook, "__self__", hook), where)
            return hook, {}
        contents = {name: cell.cell_contents for name, cell in _cells(hook).items()}
        tensors = {name: leaf(each) for name, each in contents.items() if self._is_made(each)}
        for part in (*contents.values(), *(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values()):
            if not (self._is_made(part) and any(part is contents[name] for name in tensors)):
                self._check(part, where)
        return _filled(hook, dict.fromkeys(tensors)), tensors

    def _is_made(self, thing: Any) -> bool:
        return isinstance(thing, Tensor) and self.values.fake.is_our_fake(thing)

    def _check(self, thing: Any, where: str) -> None:
        """Refuse what is the recording's own, and would be another object in each call."""
        if isinstance(thing, _VALUES) or self.was_there(thing):
            return
        if isinstance(thing, Tensor) and not self._is_made(thing):
            return
        if isinstance(thing, tuple):
            for part in thing:
                self._check(part, where)
            return
        if isinstance(thing, types.FunctionType):
            for cell in _cells(thing).values():
                self._check(cell.cell_contents, where)
            return
        raise UnsupportedError(
            f"{where} registers a hook on a tensor that holds a {type(thing).__name__} made in the forward; keep it in "
            "an attribute of the module"
        )


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _filled(hook: Callable[..., Any], contents: Mapping[str, Any]) -> Callable[..., Any]:
    """The function with other contents of some variables of its closure."""
    if not contents or not isinstance(hook, types.FunctionType):
        return hook
    cells = tuple(types.CellType(contents[name]) if name in contents else old for name, old in _cells(hook).items())
    made = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
    made.__kwdefaults__ = hook.__kwdefaults__
    return made
