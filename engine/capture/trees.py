"""Containers of a forward's results: PyTorch's pytrees, and objects that it does not know as such.

Dataclasses, `SimpleNamespace`, subclasses of dict, list and set, and objects of the network's own classes are taken
apart as well, each into a `Made` whose parts are a pytree; `realize` makes a new object of the same class of it.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedError
from .walk import of_library


class Made:
    """An object that was made in the forward, taken apart.

    Attributes:
        like: an object of its class without the contents; copied, then filled.
        items: the contents if it is a dict, list or set; None otherwise.
        attributes: the instance's attributes by name.
    """

    def __init__(self, like: Any, items: Any, attributes: dict[str, Any]):
        self.like, self.items, self.attributes = like, items, attributes

    def build(self) -> Any:
        made = _copied(self.like)
        items = realize(self.items)
        if isinstance(made, dict):
            kind: Any = OrderedDict if isinstance(made, OrderedDict) else dict
            for key, value in items.items():
                kind.__setitem__(made, key, value)  # not the class's own, which may do more
        elif isinstance(made, list):
            list.extend(made, items)
        elif isinstance(made, set):
            set.update(made, items)
        for name, value in self.attributes.items():
            object.__setattr__(made, name, realize(value))
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


def _copied(value: Any) -> Any:
    """A shallow copy; without contents, where its class takes arguments that a copy does not give it."""
    try:
        return copy.copy(value)
    except TypeError:
        return type(value).__new__(type(value))  # pyright: ignore[reportCallIssue]


def realize(tree: Any) -> Any:
    """The tree with an object in the place of every `Made` and `Kept`."""

    def real(leaf: Any) -> Any:
        return leaf.build() if isinstance(leaf, Made) else leaf.find() if isinstance(leaf, Kept) else leaf

    return pytree.tree_map(real, tree, is_leaf=lambda leaf: isinstance(leaf, Made))


def taken_apart(value: Any, leaf: Callable[[Tensor], Any], keep: Callable[[Any], Kept | None], where: str) -> Any:
    """The tree with `leaf(tensor)` in the place of tensors, as a pytree.

    Args:
        keep: what stands for an object that was there before the forward; None for others.
        where: what messages call the place of the tree.

    Raises:
        UnsupportedError: for objects that contain themselves.
    """
    inside: list[int] = []

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return leaf(value)
        if isinstance(value, (str, bytes, int, float, complex, type(None), type, types.ModuleType, nn.Module)):
            return value
        if isinstance(value, torch.Size):  # to pytrees a tuple
            return Made(value, None, {})
        if id(value) in inside:
            raise UnsupportedError(f"{where} holds a {type(value).__name__} that contains itself; return plain values")
        if (kept := keep(value)) is not None:
            return kept
        inside.append(id(value))
        try:
            return parts(value)
        finally:
            inside.pop()

    def parts(value: Any) -> Any:
        node = pytree.SUPPORTED_NODES.get(type(value))
        if node is not None or pytree.is_namedtuple_instance(value):
            node = node or pytree.SUPPORTED_NODES[pytree.namedtuple]  # pyright: ignore
            children, context = node.flatten_fn(value)
            return node.unflatten_fn([visit(child) for child in children], context)
        if isinstance(value, (dict, list, set)):
            like = _copied(value)
            kind: Any = next(c for c in (OrderedDict, dict, list, set) if isinstance(value, c))
            kind.clear(like)
            getattr(like, "__dict__", {}).clear()  # attributes may be tensors, as those of transformers' outputs
            items = dict(dict.items(value)) if isinstance(value, dict) else list(value)
            return Made(like, visit(items), _attributes(value, visit))
        fields = _attributes(value, visit)
        if not fields or (of_library(value) and not isinstance(value, types.SimpleNamespace)):
            return value
        like = type(value).__new__(type(value))  # pyright: ignore[reportCallIssue]
        return Made(like, None, fields)

    return visit(value)


def _attributes(value: Any, visit: Callable[[Any], Any]) -> dict[str, Any]:
    """The instance's attributes; of a class with slots those that its dataclass names."""
    own = getattr(value, "__dict__", None)
    if own is None and dataclasses.is_dataclass(value):
        own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    if own is None or isinstance(value, (types.FunctionType, types.MethodType)):
        return {}
    return {name: visit(part) for name, part in own.items()}
