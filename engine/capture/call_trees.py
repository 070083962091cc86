"""Trees of arguments and results, a faster form of `torch.utils._pytree` for recordings, which traverse many.

Tuples, lists and dicts of tensors and plain values take a quarter of PyTorch's time; other types are left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import torch_private


@dataclass(frozen=True, slots=True)
class Ref:
    """A value's number, which replaces a tensor among the arguments of a call."""

    value: int


_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, Ref})


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with `function(leaf)` for every leaf."""
    kind = type(tree)
    if kind in _PLAIN or isinstance(tree, Tensor):
        return function(tree)
    if kind is tuple:
        return tuple([tree_map(function, part) for part in tree])
    if kind is list:
        return [tree_map(function, part) for part in tree]
    if kind is dict:
        return {key: tree_map(function, part) for key, part in tree.items()}
    return torch_private.tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """All leaves, in order."""
    kind = type(tree)
    if kind in _PLAIN or isinstance(tree, Tensor):
        return [tree]
    if kind is tuple or kind is list:
        return [leaf for part in tree for leaf in tree_leaves(part)]
    if kind is dict:
        return [leaf for part in tree.values() for leaf in tree_leaves(part)]
    return torch_private.tree_leaves(tree)


def refs(tree: Any) -> list[int]:
    """Numbers of all values in a tree of arguments, in order."""
    return [leaf.value for leaf in tree_leaves(tree) if type(leaf) is Ref]


def bind(tree: Any, env: Any) -> Any:
    """The tree with every `Ref` replaced by `env[number]`; it runs for every op of every tile."""
    kind = type(tree)
    if kind is Ref:
        return env[tree.value]
    if kind in _PLAIN:
        return tree
    if kind is tuple:
        return tuple([bind(part, env) for part in tree])
    if kind is dict:
        return {key: bind(part, env) for key, part in tree.items()}
    return tree_map(lambda leaf: env[leaf.value] if type(leaf) is Ref else leaf, tree)
