"""Containers of a forward's results: PyTorch's pytrees, and objects that it does not know as such.

Dataclasses, `SimpleNamespace`, subclasses of dict, list and set, and objects of the network's own classes are taken
apart as well, each into a `Made` whose parts are a pytree; `realize` makes a new object of the same class of it. What
stands in several places of what a forward leaves is a `Shared` in each of them, of which a call makes one object.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedError
from .holders import plain_kind
from .walk import of_library

_PLAIN = (str, bytes, int, float, complex, type(None), enum.Enum, type, types.ModuleType, nn.Module)


class Made:
    """An object that was made in the forward, taken apart.

    Attributes:
        like: an object of its class without the contents; copied, then filled.
        items: the contents if it is a dict, list or set; None otherwise.
        attributes: the instance's attributes by name.
    """

    def __init__(self, like: Any, items: Any, attributes: dict[str, Any]):
        self.like, self.items, self.attributes = like, items, attributes

    def build(self, shared: dict[int, Any]) -> Any:
        made = _copied(self.like)
        items = realize(self.items, shared)
        if isinstance(made, dict):
            kind = plain_kind(made)
            for key, value in items.items():
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
        return type(value).__new__(type(value))  # pyright: ignore[reportCallIssue]


def realize(tree: Any, shared: dict[int, Any]) -> Any:
    """The tree with an object in the place of every `Made`, `Kept` and `Shared`.

    Args:
        shared: by their numbers the objects of the call that several places have; those that are made are added.
    """

    def real(leaf: Any) -> Any:
        if isinstance(leaf, Shared):
            if leaf.number not in shared:
                shared[leaf.number] = realize(leaf.tree, shared)
            return shared[leaf.number]
        return leaf.build(shared) if isinstance(leaf, Made) else leaf.find() if isinstance(leaf, Kept) else leaf

    return pytree.tree_map(real, tree, is_leaf=lambda leaf: isinstance(leaf, (Made, Shared)))


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
        self._where = ""

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
        """A tree when all have been made: only what was met several times is a `Shared`."""

        def settle(leaf: Any) -> Any:
            if not isinstance(leaf, Shared):
                return leaf
            inner = self.settled(leaf.tree)
            return Shared(leaf.number, inner) if leaf.number in self._again else inner

        return pytree.tree_map(settle, tree, is_leaf=lambda leaf: isinstance(leaf, Shared))

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
            return kept
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
        node = pytree.SUPPORTED_NODES.get(type(value))
        if node is not None or pytree.is_namedtuple_instance(value):
            node = node or pytree.SUPPORTED_NODES[pytree.namedtuple]  # pyright: ignore
            children, context = node.flatten_fn(value)
            return node.unflatten_fn([self._visit(child) for child in children], context)
        if isinstance(value, (dict, list, set)):
            like = _copied(value)
            kind: Any = plain_kind(value) if isinstance(value, dict) else list if isinstance(value, list) else set
            kind.clear(like)
            getattr(like, "__dict__", {}).clear()  # attributes may be tensors, as those of transformers' outputs
            items = dict(kind.items(value)) if isinstance(value, dict) else list(value)
            return Made(like, self._visit(items), _attributes(value, self._visit))
        fields = _attributes(value, self._visit)
        if not fields or (of_library(value) and not isinstance(value, types.SimpleNamespace)):
            return value
        like = type(value).__new__(type(value))  # pyright: ignore[reportCallIssue]
        return Made(like, None, fields)


def _attributes(value: Any, visit: Callable[[Any], Any]) -> dict[str, Any]:
    """The instance's attributes; of a class with slots those that its dataclass names."""
    own = getattr(value, "__dict__", None)
    if own is None and dataclasses.is_dataclass(value):
        own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    if own is None or isinstance(value, (types.FunctionType, types.MethodType)):
        return {}
    return {name: visit(part) for name, part in own.items()}
