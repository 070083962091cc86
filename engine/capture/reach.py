"""Which methods of a network's classes its forward can come to, told by their names.

Classes have methods for all that is done with a network: to load it, to train it, to publish it on a hub. What those
lead to is a whole program that no forward runs. A method counts as reached when code that is reached mentions its name,
as an attribute or in a string; when Python or a library may call it by itself; or when code of a file of its class
makes names up.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# What PyTorch calls of a module or an autograd function.
_BY_PYTORCH = frozenset(
    "forward backward setup_context jvp vjp vmap right_inverse _call_impl _wrapped_call_impl".split()
)
# A module's are run where one is made, which a forward that does so says by the name of its class.
_OF_MAKING = frozenset("__init__ __new__ __init_subclass__ __set_name__ __post_init__".split())
_BY_A_FUNCTION = frozenset("getattr vars eval exec attrgetter methodcaller".split())
_BY_AN_ATTRIBUTE = frozenset("__dict__ __getattribute__ attrgetter methodcaller".split())

_OF_GLOBALS = frozenset("LOAD_GLOBAL LOAD_NAME LOAD_FROM_DICT_OR_GLOBALS STORE_GLOBAL DELETE_GLOBAL".split())

Reached = tuple[Any, ...]  # what the walk is to look at


def mentioned(code: types.CodeType) -> Iterator[str]:
    """The global and attribute names that a function and the functions inside it mention."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from mentioned(constant)


def loaded(code: types.CodeType) -> Iterator[str]:
    """Those of the mentioned names that are looked for among the globals of the function's file."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in _OF_GLOBALS)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from loaded(constant)


def _strings(constant: Any) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for part in constant:
            yield from _strings(part)
    elif isinstance(constant, types.CodeType):
        for part in constant.co_consts:
            yield from _strings(part)


def _makes_names_up(code: types.CodeType) -> bool:
    """Whether code asks for attributes by names that are not written in it; `net.eval()` does not."""
    if not _BY_A_FUNCTION.union(_BY_AN_ATTRIBUTE).isdisjoint(code.co_names):
        for step in dis.get_instructions(code):
            asked = _BY_A_FUNCTION if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else _BY_AN_ATTRIBUTE
            if step.argval in asked and step.opname.startswith("LOAD_"):
                return True
    return any(_makes_names_up(part) for part in code.co_consts if isinstance(part, types.CodeType))


def imported(function: types.FunctionType) -> Iterator[types.ModuleType]:
    """The files that a function imports itself, or asks for by their names."""
    names = [*mentioned(function.__code__), *_strings(function.__code__)]
    package = str(function.__globals__.get("__package__") or "").split(".")
    above = ["", *(".".join(package[:n]) + "." for n in range(1, len(package) + 1) if package[0])]
    for name in dict.fromkeys(prefix + name for name in names for prefix in above):
        file = sys.modules.get(name)
        if isinstance(file, types.ModuleType):
            yield file


class Reach:
    """The methods that wait until something mentions them."""

    def __init__(self) -> None:
        self._names = set[str](_BY_PYTORCH)
        self._inventive: set[str] = set()  # files whose code makes names up
        self._files: dict[type, set[str]] = {}  # by class: those that it and what inherits from it are from
        self._waiting: dict[str, list[tuple[type, Reached]]] = {}

    def inherits(self, base: type, files: Iterable[str]) -> Iterator[Reached]:
        """A class is met, or what inherits from it; what waits no longer."""
        self._files.setdefault(base, set()).update(files)
        yield from self._of_inventive()

    def waits(self, kind: type, base: type, key: str, method: Reached) -> bool:
        """Whether a method that a class has from one of its bases, or from itself, is not reached yet."""
        if key in _OF_MAKING and issubclass(kind, nn.Module):
            key = kind.__name__
        elif key.startswith("__") and key.endswith("__"):
            return False
        if key in self._names or not self._inventive.isdisjoint(self._files[base]):
            return False
        self._waiting.setdefault(key, []).append((base, method))
        return True

    def by(self, function: types.FunctionType) -> Iterator[Reached]:
        """What waits no longer when a function is reached."""
        yield from self.names([*mentioned(function.__code__), *_strings(function.__code__)])
        if function.__module__ not in self._inventive and _makes_names_up(function.__code__):
            self._inventive.add(function.__module__)
            yield from self._of_inventive()

    def names(self, names: Iterable[str]) -> Iterator[Reached]:
        """What waits no longer when names are mentioned."""
        for name in dict.fromkeys(names):  # in their order, so that a walk is the same in each run
            self._names.add(name)
            yield from (method for _, method in self._waiting.pop(name, ()))

    def mentions(self, name: str) -> bool:
        """Whether code that is reached mentions a name."""
        return name in self._names

    def _of_inventive(self) -> Iterator[Reached]:
        for name, waiting in self._waiting.items():
            here = [entry for entry in waiting if not self._inventive.isdisjoint(self._files[entry[0]])]
            if here:
                self._waiting[name] = [entry for entry in waiting if entry not in here]
                yield from (method for _, method in here)
