"""Which methods of a network's classes its forward can come to, told by their names.

Classes have methods for all that is done with a network: to load it, to train it, to publish it on a hub. What those
lead to is a whole program that no forward runs. A method counts as reached when code that is reached mentions its name,
as an attribute or in a string; when Python or a library may call it by itself; or when code of a file of its class
makes names up.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# What PyTorch calls of a module or an autograd function.
_BY_PYTORCH = frozenset(
    "forward backward setup_context jvp vjp vmap right_inverse _call_impl _wrapped_call_impl".split()
)
_MAKES_NAMES_UP = frozenset("getattr __getattribute__ attrgetter methodcaller vars __dict__ eval exec".split())

Reached = tuple[Any, ...]  # what the walk is to look at


def mentioned(code: types.CodeType) -> Iterator[str]:
    """The global and attribute names that a function and the functions inside it mention."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from mentioned(constant)


def _strings(constant: Any) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for part in constant:
            yield from _strings(part)
    elif isinstance(constant, types.CodeType):
        for part in constant.co_consts:
            yield from _strings(part)


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

    def waits(self, base: type, key: str, method: Reached) -> bool:
        """Whether a method of a class is not reached yet."""
        if key == "__init__" and issubclass(base, nn.Module):
            key = base.__name__  # a forward that makes modules mentions their class
        elif key.startswith("__") and key.endswith("__"):
            return False
        if key in self._names or not self._inventive.isdisjoint(self._files[base]):
            return False
        self._waiting.setdefault(key, []).append((base, method))
        return True

    def by(self, function: types.FunctionType) -> Iterator[Reached]:
        """What waits no longer when a function is reached."""
        names = {*mentioned(function.__code__), *_strings(function.__code__)}
        yield from self.names(names)
        if names & _MAKES_NAMES_UP and function.__module__ not in self._inventive:
            self._inventive.add(function.__module__)
            yield from self._of_inventive()

    def names(self, names: Iterable[str]) -> Iterator[Reached]:
        """What waits no longer when names are mentioned."""
        for name in set(names) - self._names:
            self._names.add(name)
            yield from (method for _, method in self._waiting.pop(name, ()))

    def _of_inventive(self) -> Iterator[Reached]:
        for name, waiting in self._waiting.items():
            here = [entry for entry in waiting if not self._inventive.isdisjoint(self._files[entry[0]])]
            if here:
                self._waiting[name] = [entry for entry in waiting if entry not in here]
                yield from (method for _, method in here)
