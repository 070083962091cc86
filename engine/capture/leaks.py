"""Tensors without values that would outlive their recording: let go, or refused."""

from __future__ import annotations

import functools
import gc
import types
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError


def let_go(weak: list[Any], refuse: bool) -> None:
    """Make sure that no tensor without values is left: caches that hold one are emptied, others refused."""
    left = [ref for ref in weak if ref() is not None]
    if not left:
        return
    gc.collect()
    left = [ref for ref in left if ref() is not None]
    if not left:
        return
    for cache in [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper]:
        if _reaches(cache, {id(ref()) for ref in left}):
            cache.cache_clear()
    left = [ref for ref in left if ref() is not None]
    names = sorted({_drop(ref()) for ref in left if ref() is not None})
    if names and refuse:
        raise UnsupportedError(
            f"the forward leaves tensors in {names[0]}, where later calls would not put theirs; return them, or keep "
            "them in an attribute of a module"
        )


def _reaches(thing: Any, wanted: set[int], depth: int = 5) -> bool:
    inside = [part for part in gc.get_referents(thing) if not isinstance(part, (type, types.ModuleType))]
    if any(id(part) in wanted for part in inside):
        return True
    return depth > 0 and any(
        _reaches(part, wanted, depth - 1) for part in inside if isinstance(part, (dict, list, tuple, set))
    )


def _drop(tensor: Tensor | None) -> str:
    """Take a tensor without values out of what holds it; what messages call that."""
    found = ""
    for holder in gc.get_referrers(tensor):
        if isinstance(holder, dict):
            for key in [key for key, value in holder.items() if value is tensor]:
                del holder[key]
            found = "a dict that is no attribute of a module"
        elif isinstance(holder, list):
            holder[:] = [item for item in holder if item is not tensor]
            found = "a list that is no attribute of a module"
        elif isinstance(holder, set):
            holder.discard(tensor)
            found = "a set that is no attribute of a module"
        elif isinstance(holder, types.CellType):
            found = "a function that it returns or keeps"
    return found or "an object that is no attribute of a module"
