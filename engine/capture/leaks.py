"""Tensors without values that would outlive their recording: let go, or refused."""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError


def let_go(weak: list[Any], refuse: bool, changes: Callable[[Tensor], bool] = lambda _: False) -> None:
    """Make sure that no tensor without values is left: caches that hold one are emptied, others refused.

    So are caches of what `changes` from call to call, of which stock would take that of the first call.

    Each look through all objects of the process takes a tenth of a second, or a whole one. Where an error is on its way
    (`refuse` is false) its traceback may hold some: they go with it, and what is in cycles at the next collection.
    """
    left = [ref for ref in weak if ref() is not None]
    if left and refuse:
        gc.collect()
        left = [ref for ref in left if ref() is not None]
    if not left:
        return
    wanted = {id(tensor) for ref in left if (tensor := ref()) is not None}
    other = {id(tensor) for ref in left if (tensor := ref()) is not None and changes(tensor)}
    stale = set[str]()
    for cache in [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper]:
        if _reaches(cache, wanted):
            if _reaches(cache, other):
                stale.add(getattr(cache, "__qualname__", "a function"))
            cache.cache_clear()
    tensors = [tensor for ref in left if (tensor := ref()) is not None]
    names = _drop(tensors) if tensors else set[str]()
    if refuse and stale:
        raise UnsupportedError(
            f"'{min(stale)}' keeps tensors of weights or of random numbers in a functools.lru_cache, where later calls "
            "would find those of the first; make them anew in each call"
        )
    if refuse and names:
        raise UnsupportedError(
            f"the forward leaves tensors in {min(names)}, where later calls would not put theirs; return them, or keep "
            "them in an attribute of a module"
        )


def _reaches(thing: Any, wanted: set[int], depth: int = 5) -> bool:
    inside = [part for part in gc.get_referents(thing) if not isinstance(part, (type, types.ModuleType))]
    if any(id(part) in wanted for part in inside):
        return True
    return depth > 0 and any(
        _reaches(part, wanted, depth - 1) for part in inside if isinstance(part, (dict, list, tuple, set))
    )


def _drop(tensors: list[Tensor]) -> set[str]:
    """Take tensors without values out of what holds them; what messages call that."""
    found = set()
    wanted = {id(tensor) for tensor in tensors}
    for holder in gc.get_referrers(*tensors):
        if isinstance(holder, dict):
            for key in [key for key, value in holder.items() if id(value) in wanted]:
                del holder[key]
            found.add("a dict that is no attribute of a module")
        elif isinstance(holder, list) and holder is not tensors:
            holder[:] = [item for item in holder if id(item) not in wanted]
            found.add("a list that is no attribute of a module")
        elif isinstance(holder, set):
            holder.difference_update(tensors)
            found.add("a set that is no attribute of a module")
        elif isinstance(holder, types.CellType):
            found.add("a function that it returns or keeps")
    return found or {"an object that is no attribute of a module"}
