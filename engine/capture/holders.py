"""Where a forward can read and change something besides its arguments: places of named contents.

A *holder* is one of them: the attributes of a module, an object or a class, a dict, list, set, deque or numpy array, a
cell of a closure, a context variable, those names of a Python file that a function mentions.
"""

from __future__ import annotations

import ctypes
import os
import types
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np


@dataclass(eq=False)
class Holder:
    """A place of named contents.

    Attributes:
        owner: the object that has them.
        name: what messages call it.
        read: the contents by key, as they are now.
        write: makes the contents these.
        parent: the holder in which the owner was found, and under which key; None for modules and functions.
        kind: which of a module's own dictionaries it is: "_parameters", "_buffers" or "_modules"; "attributes" of those
            of any object, "dict" of any other dict, "tuple" of a tuple or a `partial`, whose parts stay.
        fast: a dict or mapping whose values are the contents.
        again: the same for an owner that has taken the place of this one, unless it is a dict, list, set or deque.
    """

    owner: Any
    name: str
    read: Callable[[], dict[Any, Any]]
    write: Callable[[dict[Any, Any]], None]
    parent: tuple[Holder, Any] | None = None
    kind: str = ""
    fast: Any = None
    again: Callable[[Any], Holder | None] | None = None


def attributes(thing: Any, name: str, parent: tuple[Holder, Any] | None) -> Holder:
    own = vars(thing)

    def write(contents: dict[Any, Any]) -> None:
        for key in [key for key in own if key not in contents]:
            del own[key]
        own.update(contents)

    return Holder(own, name, lambda: dict(own), write, parent, "attributes", fast=own)


def mapping(thing: dict[Any, Any], name: str, parent: tuple[Holder, Any] | None, kind: str = "dict") -> Holder:
    plain = plain_kind(thing)

    def write(contents: dict[Any, Any]) -> None:
        plain.clear(thing)
        for key, value in contents.items():
            plain.__setitem__(thing, key, value)

    return Holder(thing, name, lambda: dict(plain.items(thing)), write, parent, kind, fast=thing)


def plain_kind(thing: dict[Any, Any]) -> Any:
    """The class whose methods reach a dict's contents and order; those of its own class may do more."""
    return OrderedDict if isinstance(thing, OrderedDict) else dict


def sequence(thing: Any, name: str, parent: tuple[Holder, Any] | None) -> Holder:
    def write(contents: dict[Any, Any]) -> None:
        thing.clear()
        thing.extend(contents.values())

    return Holder(thing, name, lambda: dict(enumerate(thing)), write, parent)


def items(thing: tuple[Any, ...], name: str, parent: tuple[Holder, Any] | None) -> Holder:
    """Those of a tuple, which nobody changes: what is in them is found by their places."""
    return Holder(thing, name, lambda: dict(enumerate(thing)), lambda _contents: None, parent, "tuple")


def partial_parts(thing: partial[Any], name: str, parent: tuple[Holder, Any] | None) -> Holder:
    """The function and arguments of a `partial`: those by name are a dict, which can be changed."""
    read = lambda: {"func": thing.func, "args": thing.args, "keywords": thing.keywords}  # noqa: E731
    return Holder(thing, name, read, lambda _contents: None, parent, "tuple")


def set_items(thing: set[Any], name: str, parent: tuple[Holder, Any] | None) -> Holder:
    def write(contents: dict[Any, Any]) -> None:
        thing.clear()
        thing.update(contents.values())

    return Holder(thing, name, lambda: {id(item): item for item in thing}, write, parent)


def cell(thing: types.CellType, name: str) -> Holder:
    def read() -> dict[Any, Any]:
        try:
            return {"contents": thing.cell_contents}
        except ValueError:
            return {}

    def write(contents: dict[Any, Any]) -> None:
        if "contents" in contents:
            thing.cell_contents = contents["contents"]
        elif read():
            del thing.cell_contents

    return Holder(thing, name, read, write)


def file_names(names: Sequence[str], space: dict[str, Any], name: str) -> Holder:
    def write(contents: dict[Any, Any]) -> None:
        for key in names:
            if key in contents:
                space[key] = contents[key]
            else:
                space.pop(key, None)

    return Holder(space, name, lambda: {key: space[key] for key in names if key in space}, write)


def slots(thing: Any, name: str, parent: tuple[Holder, Any] | None) -> Holder | None:
    """The attributes of an object whose class has `__slots__`."""
    spaces = [vars(base) for base in type(thing).__mro__ if "__slots__" in vars(base)]
    names = [k for space in spaces for k, v in space.items() if isinstance(v, types.MemberDescriptorType)]

    def write(contents: dict[Any, Any]) -> None:
        for key in names:
            if key in contents:
                object.__setattr__(thing, key, contents[key])  # also of frozen dataclasses
            elif hasattr(thing, key):
                object.__delattr__(thing, key)

    read = lambda: {key: getattr(thing, key) for key in names if hasattr(thing, key)}  # noqa: E731
    again = lambda other: slots(other, name, parent)  # noqa: E731
    return Holder(thing, name, read, write, parent, again=again) if names else None


def class_attributes(kind: type) -> Holder:
    own = vars(kind)

    def write(contents: dict[Any, Any]) -> None:
        for key in [key for key in own if key not in contents]:
            delattr(kind, key)
        for key in [key for key, value in contents.items() if own.get(key, write) is not value]:
            setattr(kind, key, contents[key])

    return Holder(kind, f"the class {kind.__name__}", lambda: dict(own), write, fast=own)


def objects(thing: np.ndarray, name: str, parent: tuple[Holder, Any] | None) -> Holder:
    """Those of a numpy array of dtype object."""

    def write(contents: dict[Any, Any]) -> None:
        for place, value in contents.items():
            thing.flat[place] = value

    read = lambda: dict(enumerate(thing.flat))  # noqa: E731
    return Holder(thing, name, read, write, parent, again=lambda other: objects(other, name, parent))


def numbers(thing: Any, name: str, parent: tuple[Holder, Any] | None) -> Holder:
    """Those of an array of numpy's, Python's or ctypes'; no view of its memory is kept, or it could not grow."""

    def now() -> bytes:
        return thing.tobytes() if isinstance(thing, (np.ndarray, array)) else bytes(thing)

    latest = [now()]

    def read() -> dict[Any, Any]:  # the same object as long as the numbers are the same
        found = now()
        latest[0] = latest[0] if found == latest[0] else found
        return {"numbers": latest[0]}

    def write(contents: dict[Any, Any]) -> None:
        if isinstance(thing, np.ndarray):
            thing[...] = np.frombuffer(contents["numbers"], thing.dtype).reshape(thing.shape)
        elif isinstance(thing, bytearray):
            thing[:] = contents["numbers"]
        elif isinstance(thing, array):
            thing[:] = array(thing.typecode, contents["numbers"])
        else:
            ctypes.memmove(ctypes.byref(thing), contents["numbers"], ctypes.sizeof(thing))

    return Holder(thing, name, read, write, parent, again=lambda other: numbers(other, name, parent))


def context(thing: ContextVar[Any]) -> Holder:
    def read() -> dict[Any, Any]:
        try:
            return {"value": thing.get()}
        except LookupError:
            return {}

    def write(contents: dict[Any, Any]) -> None:
        if contents:
            thing.set(contents["value"])

    return Holder(thing, f"the context variable {thing.name}", read, write)


def environment() -> Holder:
    def write(contents: dict[Any, Any]) -> None:
        os.environ.clear()
        os.environ.update(contents)

    return Holder(os.environ, "the environment", lambda: dict(os.environ), write)
