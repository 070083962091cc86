"""What counts of values that every call replaces, and that the next one may look at."""

from __future__ import annotations

import enum
import numbers
import types
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Container, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import holders
from .walk import ARRAY_BYTES

FORM = attrgetter("shape", "dtype", "device", "requires_grad", "layout")
PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.Size, torch.dtype, torch.device)
_VALUES = (*PLAIN, numbers.Number, np.generic, enum.Enum)  # that are equal or not, whichever object it is
# Of these it counts which one it is: the walk has their contents apart.
_OWN_PLACE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, partial, nn.Module)
_CONTAINERS = (dict, list, set, frozenset, deque)


def _form(tensor: Tensor) -> Any:
    return FORM(tensor), tensor.stride() if tensor.layout == torch.strided else None


def _no_form(_tensor: Tensor) -> None:
    return None


class Looks:
    """What counts of values that every call replaces: nested types, plain values, and which of them are the same.

    Of tensors their form, at most, not their values; of functions, modules and what else is not looked into that they
    are the same ones.

    Args:
        known: tells where the network has something elsewhere; None where it has not.
    """

    def __init__(self, known: Callable[[Any], Any]):
        self.known = known
        self._numbers: dict[int, int] = {}

    def at(self, thing: Any, form: Callable[[Tensor], Any]) -> Any:
        kind = type(thing)
        if isinstance(thing, float):
            return kind, thing.hex()  # an equal one: of two that are no number too
        if isinstance(thing, _VALUES):
            return kind, thing
        if isinstance(thing, types.MethodType):  # each look at `self.method` makes one
            return kind, _Same(thing.__self__), _Same(thing.__func__)
        if isinstance(thing, tuple):  # of two equal ones nobody asks which one it is
            return kind, tuple(self.at(part, form) for part in thing)
        if type(thing) is weakref.ref:
            return kind, self.at(thing(), form)
        met, number = id(thing) in self._numbers, self._numbers.setdefault(id(thing), len(self._numbers))
        which = number, self.known(thing)
        if met:
            return kind, which
        if isinstance(thing, Tensor):
            return kind, which, form(thing), [(key, _alone(value)) for key, value in vars(thing).items()]
        if isinstance(thing, _OWN_PLACE):
            return kind, which, _Same(thing)
        return kind, which, self._inside(thing, form)

    def _inside(self, thing: Any, form: Callable[[Tensor], Any]) -> Any:
        """All that the walk finds in it."""
        if isinstance(thing, (np.ndarray, array, bytearray)):
            return _Same(thing) if (numbers := _numbers(thing)) is None else numbers
        found: list[Any] = []
        if isinstance(thing, Mapping):
            found += [(_Same(k) if isinstance(k, Tensor) else k, self.at(v, form)) for k, v in thing.items()]
        elif isinstance(thing, (list, deque)):
            found += [self.at(part, form) for part in thing]
        elif isinstance(thing, (set, frozenset)):  # what is in it cannot be told apart later
            found += map(_alone, thing)
        if type(thing) in _CONTAINERS:
            return found
        own, slots = getattr(thing, "__dict__", None), holders.slots(thing, "", None)
        for space in (own, None if slots is None else slots.read()):
            found += [(key, self.at(value, form)) for key, value in (space or {}).items() if key != "__dict__"]
        looked_into = isinstance(thing, (Mapping, *_CONTAINERS)) or own is not None or slots is not None
        return found if looked_into else _Same(thing)


class _Same:
    """Equal to what is made of the same object; it keeps none alive that can do without."""

    def __init__(self, thing: Any):
        try:
            self._get: Callable[[], Any] = weakref.ref(thing)
        except TypeError:
            self._get = lambda: thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (mine := self._get()) is not None and mine is other._get()

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _alone(thing: Any) -> Any:
    """What counts of a value that is not looked into."""
    return (type(thing), thing) if isinstance(thing, _VALUES) else _Same(thing)


def _numbers(thing: Any) -> Any:
    """Those of an array, unless they are too many to be compared at each call."""
    view = memoryview(thing) if not isinstance(thing, np.ndarray) else thing
    if view.nbytes > ARRAY_BYTES or (isinstance(thing, np.ndarray) and thing.dtype.hasobject):
        return None
    return getattr(view, "dtype", view.format if isinstance(view, memoryview) else None), view.shape, view.tobytes()


def counting(thing: Any, seen: Container[int]) -> Callable[[Tensor], Any]:
    """What counts of tensors that every call replaces: their form, if the forward looked at any of them."""
    tensors: list[Tensor] = []
    Looks(lambda _thing: None).at(thing, tensors.append)
    return _form if any(id(tensor) in seen for tensor in tensors) else _no_form
