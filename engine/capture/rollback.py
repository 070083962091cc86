"""The state that a forward can write, saved before a call that may be refused after a part of it has run."""

from __future__ import annotations

import os
import random
import re
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .tracebacks import ENGINE, is_users

# gigamorph's own files have state of other networks.
_OURS = tuple(os.path.join(os.path.dirname(ENGINE), name, "") for name in ("engine", "kernels", "cli"))
_ITEMS = 10_000  # containers with more are data, not state
_OF_DYNAMO = re.compile(r"__|.*_\d+_c\d+$|.*\W")  # names of globals
_BYTES = 1 << 20  # so are larger arrays and tensors that are not held by a module


class Rollback:
    """Saves a network's parameters, buffers and attributes, and what its code can reach by name.

    These are objects that modules hold, attributes of their classes, globals of the files that define them, default
    arguments and closures, and objects and functions of the user's own files in them; each with the items of
    containers. The random numbers of the CPU are saved, too.

    Args:
        network: None if the call has none.
    """

    def __init__(self, network: nn.Module | None):
        self._undo: list[Callable[[], Any]] = []
        self._seen = dict[int, Any]()  # kept alive, so that ids stay unique
        self._held = set[int]()  # what modules hold directly
        for module in [] if network is None else network.modules():
            for table in (vars(module), *map(vars(module).get, ("_parameters", "_buffers"))):
                self._held.update(map(id, (table or {}).values()))
        pending: list[Any] = [network]
        while pending:
            value = pending.pop()
            if id(value) not in self._seen and not isinstance(value, str | int | float | None):
                self._seen[id(value)] = value
                pending.extend(self._save(value))
        generator, numbers = torch.get_rng_state(), random.getstate()
        arrays = np.random.get_state()
        self._undo.append(lambda: (torch.set_rng_state(generator), random.setstate(numbers)))
        self._undo.append(lambda: np.random.set_state(arrays))

    def undo(self) -> None:
        """Bring back what it was when this object was made."""
        with torch.no_grad():
            for step in self._undo:
                step()

    def _save(self, value: Any) -> Iterator[Any]:
        """Save one object; yields what it holds."""
        if isinstance(value, Tensor):
            yield vars(value)
        if isinstance(value, Tensor | np.ndarray):
            if _has_memory(value) and (id(value) in self._held or value.nbytes <= _BYTES):
                self._undo.append(_restore_memory(value))
        elif isinstance(value, list | set | deque | dict):
            if len(value) <= _ITEMS:
                before = dict(value) if isinstance(value, dict) else list(value)
                self._undo.append(lambda: _restore_items(value, before))
                yield from before.values() if isinstance(before, dict) else before
        elif isinstance(value, tuple):
            yield from value[:_ITEMS]
        elif isinstance(value, types.FunctionType):
            yield from (vars(value), value.__defaults__, value.__kwdefaults__, value.__closure__)
            if _own(value.__code__.co_filename):
                yield value.__globals__
        elif isinstance(value, types.CellType):
            content = _content(value)
            self._undo.append(lambda: content and setattr(value, "cell_contents", content[0]))
            yield from content
        elif isinstance(value, types.MethodType | staticmethod | classmethod):
            yield from (value.__func__, getattr(value, "__self__", None))
        elif isinstance(value, property):
            yield from (value.fget, value.fset)
        elif isinstance(value, type):
            if _own(_file(value)) or (issubclass(value, nn.Module) and _is_of_network(_file(value))):
                attributes = dict(vars(value))
                self._undo.append(lambda: _restore_attributes(value, attributes))
                yield from (*attributes.values(), *value.__bases__)
                yield from (one.__globals__ for one in attributes.values() if isinstance(one, types.FunctionType))
        elif isinstance(value, types.ModuleType):
            if _own(getattr(value, "__file__", None)):
                yield vars(value)
        elif isinstance(value, nn.Module) or id(value) in self._held or _own(_file(type(value))):
            yield from (type(value), getattr(value, "__dict__", None))


def _own(file: str | None) -> bool:
    """Whether a file is the user's own, not one of an installed library."""
    return _is_of_network(file) and "-packages" not in str(file)


def _is_of_network(file: str | None) -> bool:
    return file is not None and is_users(file) and not file.startswith(_OURS)


def _file(kind: type) -> str | None:
    """The file that defines a class; of a class made by `exec` or in a notebook, the file of its code."""
    code = next((one.__code__ for one in vars(kind).values() if isinstance(one, types.FunctionType)), None)
    return None if code is None else code.co_filename


def _content(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty
        return []


def _has_memory(value: Tensor | np.ndarray[Any, Any]) -> bool:
    return isinstance(value, np.ndarray) or not (is_lazy(value) or value.is_meta or value.layout != torch.strided)


def _restore_memory(value: Tensor | np.ndarray[Any, Any]) -> Callable[[], Any]:
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: np.copyto(value, array) if value.flags.writeable else None
    alias, before = value.detach(), value.detach().clone()
    wants, grad = value.requires_grad, value.grad if value.is_leaf else None

    def restore() -> None:
        if value.data_ptr() != alias.data_ptr() or value.shape != alias.shape:
            value.data = alias
        if not torch.equal(value, before):
            value.copy_(before)
        if value.is_leaf:
            value.grad = grad
            value.requires_grad_(wants)

    return restore


def _restore_items(value: Any, before: Any) -> None:
    if isinstance(value, dict):
        is_globals = "__builtins__" in value
        for key in [key for key in value if key not in before]:
            if not (is_globals and _OF_DYNAMO.match(key)):
                del value[key]
        if not is_globals and [*value] != [*before]:
            value.clear()
        for key, item in before.items():
            if key not in value or value[key] is not item:
                value[key] = item
    elif isinstance(value, list):
        value[:] = before
    else:
        value.clear()
        (value.extend if isinstance(value, deque) else value.update)(before)


def _restore_attributes(kind: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(kind) if name not in before]:
        delattr(kind, name)
    for name, value in before.items():
        if vars(kind).get(name, kind) is not value:
            setattr(kind, name, value)
