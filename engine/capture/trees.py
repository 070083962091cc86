"""Containers of a forward's results: PyTorch's pytrees, and objects that it does not know as such.

Dataclasses, `SimpleNamespace`, subclasses of dict, list and set, and objects of the network's own classes are taken
apart as well, each into a `Made` whose parts are a pytree; `realize` makes a new object of the same class of it. What
stands in several places of what a forward leaves is a `Shared` in each of them, of which a call makes one object.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import dis
import enum
import gc
import types
import weakref
from array import array
from collections import ChainMap, OrderedDict, UserDict, UserList
from collections.abc import Callable, Iterable
from functools import WRAPPER_ASSIGNMENTS, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedError
from . import holders
from .holders import plain_kind
from .walk import of_library

_OPEN = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap)  # a library's, but as one's own
_ARRAYS = (np.ndarray, array, bytearray)
_VIEWS: dict[Any, Callable[..., Any]] = {
    type(getattr(kind(), name)()): getattr(kind, name)
    for kind in (dict, OrderedDict)
    for name in ("keys", "values", "items")
}
_PLAIN = (str, bytes, int, float, complex, type(None), enum.Enum, type, types.ModuleType, nn.Module)


class Made:
    """An object that was made in the forward, taken apart.

    Attributes:
        like: an object of its class without the contents; copied, then filled.
        items: the contents if it is a dict, list or set, of a dict as pairs where the forward has made keys; None
            otherwise.
        attributes: the instance's attributes by name.
    """

    def __init__(self, like: Any, items: Any, attributes: dict[str, Any]):
        self.like, self.items, self.attributes = like, items, attributes

    def build(self, shared: dict[int, Any]) -> Any:
        kind = type(self.like)  # whose `__copy__` may ask for attributes
        made = object.__new__(kind) if self.items is None and _is_plain(kind) else _copied(self.like)
        items = realize(self.items, shared)
        if isinstance(made, dict):
            kind = plain_kind(made)
            for key, value in items.items() if isinstance(items, dict) else items:
                kind.__setitem__(made, key, value)
        elif isinstance(made, list):
            list.extend(made, items)
        elif isinstance(made, set):
            set.update(made, items)
        for name, value in self.attributes.items():
            object.__setattr__(made, name, realize(value, shared))
        return made


@dataclasses.dataclass(frozen=True)
class Kept:
    """An object that was there before the forward and stays itself.

    Attributes:
        find: gets the one that is in its place at a call.
    """

    find: Callable[[], Any]


pytree.register_pytree_node(
    Made,
    lambda made: ([made.items, made.attributes], made.like),
    lambda parts, like: Made(like, *parts),
    serialized_type_name="gigamorph.engine.capture.trees.Made",
)


@dataclasses.dataclass(frozen=True)
class Shared:
    """A container or object that was made in the forward and that it leaves in several places.

    Attributes:
        number: the same in all of them.
        tree: it, taken apart.
    """

    number: int
    tree: Any


@dataclasses.dataclass(frozen=True)
class Around:
    """What is around objects that were made in the forward: a function, a method, a view, a part of an array and so on.

    Attributes:
        make: makes it again, of those of a call.
        parts: what it is around, taken apart.
        was: the one of the forward and what that is around; None once it is known that it is made again.
    """

    make: Callable[..., Any]
    parts: list[Any]
    was: tuple[Any, list[Any]] | None = None


pytree.register_pytree_node(
    Around,
    lambda around: (around.parts, around.make),
    lambda parts, make: Around(make, list(parts)),
    serialized_type_name="gigamorph.engine.capture.trees.Around",
)
pytree.register_pytree_node(
    Shared,
    lambda shared: ([shared.tree], shared.number),
    lambda parts, number: Shared(number, *parts),
    serialized_type_name="gigamorph.engine.capture.trees.Shared",
)


def _copied(value: Any) -> Any:
    """A shallow copy; without contents, where its class takes arguments that a copy does not give it."""
    try:
        return copy.copy(value)
    except TypeError:
        return _bare(type(value))


def _bare(kind: Any) -> Any:
    return kind.__new__(kind)


def _is_plain(kind: type) -> bool:
    """Whether objects of a class are nothing but their attributes: no exceptions, no dates."""
    makers = (vars(base).get("__new__") for base in kind.__mro__)
    return next(make for make in makers if not isinstance(make, (staticmethod, type(None)))) is object.__new__


def _without(value: Any) -> Any:
    """An object of the same class without the attributes."""
    if _is_plain(type(value)):
        return object.__new__(type(value))
    make, given, *_ = value.__reduce_ex__(4)
    return make(*given)


def realize(tree: Any, shared: dict[int, Any]) -> Any:
    """The tree with an object in the place of every `Made`, `Kept`, `Shared` and `Around`.

    Args:
        shared: by their numbers the objects of the call that several places have; those that are made are added.
    """

    def real(leaf: Any) -> Any:
        if isinstance(leaf, Shared):
            if leaf.number not in shared:
                shared[leaf.number] = realize(leaf.tree, shared)
            return shared[leaf.number]
        if isinstance(leaf, Around):
            return leaf.make(*(realize(part, shared) for part in leaf.parts))
        return leaf.build(shared) if isinstance(leaf, Made) else leaf.find() if isinstance(leaf, Kept) else leaf

    return pytree.tree_map(real, tree, is_leaf=lambda leaf: isinstance(leaf, (Made, Shared, Around)))


class TakenApart:
    """Takes what one forward leaves apart, its result and what it has put elsewhere.

    Args:
        leaf: what stands for a tensor.
        keep: what stands for an object that was there before the forward; None for others.
    """

    def __init__(self, leaf: Callable[[Tensor], Any], keep: Callable[[Any], Kept | None]):
        self._leaf, self._keep = leaf, keep
        self._met: dict[int, tuple[Any, Shared]] = {}  # with the object, so that no other one can have its identity
        self._again: set[int] = set()
        self._inside: list[int] = []
        self._set: dict[int, types.CellType] = {}  # variables that a function encloses and sets
        self._loops: dict[int, tuple[Any, str]] = {}  # functions that enclose themselves, and where they are
        self._where = ""
        self.arrays: list[tuple[Any, str]] = []  # those met that the forward has made, and where

    def tree(self, value: Any, where: str) -> Any:
        """What is in a place, as a pytree; see `settled`.

        Args:
            where: what messages call the place.

        Raises:
            UnsupportedError: for objects that contain themselves.
        """
        self._where = where
        return self._visit(value)

    def settled(self, tree: Any) -> Any:
        """A tree when all have been made: only what was met several times is a `Shared`, what can stay is itself."""

        def settle(leaf: Any) -> Any:
            if isinstance(leaf, Around):
                return self._settled_around(leaf)
            if not isinstance(leaf, Shared):
                return leaf
            inner = self.settled(leaf.tree)
            return Shared(leaf.number, inner) if leaf.number in self._again else inner

        return pytree.tree_map(settle, tree, is_leaf=lambda leaf: isinstance(leaf, (Shared, Around)))

    def _visit(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._leaf(value)
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.Size):  # to pytrees a tuple
            return Made(value, None, {})
        if id(value) in self._inside:
            raise UnsupportedError(
                f"{self._where} holds a {type(value).__name__} that contains itself; return plain values"
            )
        if (kept := self._keep(value)) is not None:
            return value if isinstance(value, types.CellType) else kept
        if id(value) in self._met:
            _, shared = self._met[id(value)]
            self._again.add(shared.number)
            return shared
        self._inside.append(id(value))
        try:
            parts = self._parts(value)
        finally:
            self._inside.pop()
        if parts is value or isinstance(value, tuple):  # of two equal tuples nobody asks which one it is
            return parts
        # Numbers are given in the order of the result first: those of two equal results mean the same places.
        shared = Shared(len(self._met), parts)
        self._met[id(value)] = value, shared
        return shared

    def _parts(self, value: Any) -> Any:
        keys = self.keys(value) if isinstance(value, dict) else {}
        node = pytree.SUPPORTED_NODES.get(type(value))
        if (node is not None and not keys) or pytree.is_namedtuple_instance(value):
            node = node or pytree.SUPPORTED_NODES[pytree.namedtuple]  # pyright: ignore
            children, context = node.flatten_fn(value)
            parts = [self._visit(child) for child in children]
            same = isinstance(value, tuple) and all(a is b for a, b in zip(children, parts, strict=True))
            return value if same else node.unflatten_fn(parts, context)
        if isinstance(value, (dict, list, set)):
            like = _copied(value)
            kind: Any = plain_kind(value) if isinstance(value, dict) else list if isinstance(value, list) else set
            kind.clear(like)
            getattr(like, "__dict__", {}).clear()  # attributes may be tensors, as those of transformers' outputs
            items = dict(kind.items(value)) if isinstance(value, dict) else list(value)
            items = [(keys.get(k, k), self._visit(v)) for k, v in items.items()] if keys else self._visit(items)  # pyright: ignore[reportAttributeAccessIssue]
            return Made(like, items, _attributes(value, self._visit))
        if type(value) in _ARRAYS:
            self.arrays.append((value, self._where))
        if (around := self._around(value)) is not None:
            return around
        if type(value) in _ARRAYS:
            return Made(value, None, {})
        fields = _attributes(value, self._visit)
        if not fields or (of_library(value) and not isinstance(value, _OPEN)):
            return value
        return Made(_without(value), None, fields)

    def keys(self, keys: Iterable[Any]) -> dict[Any, Any]:
        """Those keys of a dict that are not the same ones at each call, taken apart."""
        made = ((key, key if isinstance(key, (Tensor, torch.Size)) else self._visit(key)) for key in keys)
        return {key: tree for key, tree in made if tree is not key}

    def _around(self, value: Any) -> Around | None:
        """What is made around others, taken apart: whether anything of it is another one at each call is seen later."""
        if (found := _around(value)) is None:
            return None
        make, inside = found
        if isinstance(value, types.FunctionType):
            names = _sets(value.__code__)
            cells = zip(value.__code__.co_freevars, inside, strict=False)
            self._set.update((id(cell), cell) for name, cell in cells if name in names)
        if isinstance(value, types.CellType) and inside and id(inside[0]) in self._inside:
            self._loops[id(inside[0])] = inside[0], self._where
            return Around(make, inside, (value, inside))
        return Around(make, list(map(self._visit, inside)), (value, inside))

    def _settled_around(self, around: Around) -> Any:
        assert around.was is not None
        value, inside = around.was
        parts = list(map(self.settled, around.parts))
        if id(value) not in self._set and all(a is b for a, b in zip(inside, parts, strict=True)):
            return value
        if id(value) in self._loops:
            _, where = self._loops[id(value)]
            raise UnsupportedError(f"{where} holds a function that encloses itself; make it a method")
        return Around(around.make, parts)


def _around(value: Any) -> tuple[Callable[..., Any], list[Any]] | None:
    """How what is around other objects is made, and of which."""
    if isinstance(value, types.FunctionType) and "<locals>" in value.__code__.co_qualname:
        closure, defaults = value.__closure__ or (), value.__defaults__ or ()
        keywords, own = value.__kwdefaults__ or {}, vars(value)
        counts = len(closure), len(defaults), list(keywords), list(own)
        return partial(_function, value, *counts), [*closure, *defaults, *keywords.values(), *own.values()]
    if type(value) is np.ndarray and isinstance(value.base, np.ndarray) and not value.dtype.hasobject:
        first, start = (each.__array_interface__["data"][0] for each in (value, value.base))
        return partial(_part, value.shape, value.dtype, first - start, value.strides), [value.base]
    if isinstance(value, types.CellType):
        return types.CellType, list(holders.cell(value, "").read().values())
    if type(value) in _VIEWS:
        return _VIEWS[type(value)], gc.get_referents(value)
    if isinstance(value, types.MethodType):
        return partial(types.MethodType, value.__func__), [value.__self__]
    if isinstance(value, types.BuiltinMethodType):
        return partial(_method, value.__name__), [value.__self__]
    if type(value) is partial:
        names, keywords = list(value.keywords), list(value.keywords.values())
        count = len(value.args) + 1  # with the function
        make = lambda *parts: partial(*parts[:count], **dict(zip(names, parts[count:], strict=True)))  # noqa: E731
        return make, [value.func, *value.args, *keywords]
    if isinstance(value, types.MappingProxyType):
        return types.MappingProxyType, gc.get_referents(value)[:1]
    if type(value) is weakref.ref and value.__callback__ is None:
        return weakref.ref, [value()]
    if type(value) is frozenset:
        return lambda *parts: frozenset(parts), list(value)
    return None


def _function(like: types.FunctionType, cells: int, defaults: int, keywords: list[str], own: list[str], *parts: Any):
    """A function like another one, around other cells, with other defaults and attributes."""
    closure, usual, rest = parts[:cells], parts[cells : cells + defaults], parts[cells + defaults :]
    made = types.FunctionType(like.__code__, like.__globals__, like.__name__, usual or None, closure)
    for name in WRAPPER_ASSIGNMENTS:
        setattr(made, name, getattr(like, name))
    made.__kwdefaults__ = dict(zip(keywords, rest, strict=False)) or None
    vars(made).update(zip(own, rest[len(keywords) :], strict=True))
    return made


def _part(shape: tuple[int, ...], dtype: np.dtype, offset: int, strides: tuple[int, ...], of: np.ndarray) -> np.ndarray:
    return np.ndarray(shape, dtype, of, offset, strides)


def _sets(code: types.CodeType) -> set[str]:
    """The enclosed variables that a function, or one inside of it, sets."""
    steps = {step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_DEREF", "DELETE_DEREF")}
    inner = (_sets(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return steps.union(*inner).intersection(code.co_freevars)


def _method(name: str, owner: Any) -> Any:
    return getattr(owner, name)


def _attributes(value: Any, visit: Callable[[Any], Any]) -> dict[str, Any]:
    """The instance's attributes, those in slots too."""
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return {}
    slots = None if of_library(value) else holders.slots(value, "", None)
    own = {**getattr(value, "__dict__", {}), **({} if slots is None else slots.read())}
    return {name: visit(part) for name, part in own.items() if name != "__dict__"}
