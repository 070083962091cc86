"""Guards that TorchDynamo does not set by itself.

Dynamo guards that something is missing where the forward asks for it (`hasattr`, `in`, `dict.get`), but not where the
forward catches the error (`try: self.scale ... except AttributeError`), nor in an object's `__dict__`. What is added
there later would not be noticed. And with each recording it measures, for its statistics, how long its guards take,
for which it empties the processor's caches with 32 MiB of memory: more than a small budget has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

_on: list[None] = []  # an item for each context that is open


@contextlib.contextmanager
def more_guards() -> Iterator[None]:
    """Such guards are set in what is traced meanwhile, and none is measured."""
    _install()
    _on.append(None)
    try:
        yield
    finally:
        _on.pop()


@functools.cache
def _install() -> None:
    """Wrap the methods of Dynamo that look things up; without a context they do what they did."""
    variables = importlib.import_module("torch._dynamo.variables")
    errors = importlib.import_module("torch._dynamo.exc")
    for kind in (
        variables.UserDefinedClassVariable,
        variables.UserDefinedObjectVariable,
        variables.NNModuleVariable,
        variables.UnspecializedNNModuleVariable,
    ):
        if "var_getattr" in vars(kind):
            kind.var_getattr = _noting(kind.var_getattr, errors.ObservedAttributeError, _guard_attribute)
    items = variables.ConstDictVariable
    for name in ("mp_subscript_impl", "getitem_const_raise_exception_if_absent"):  # of some versions both
        if name in vars(items):
            setattr(items, name, _noting(vars(items)[name], errors.ObservedKeyError, _guard_item))
    own = getattr(importlib.import_module("torch._dynamo.variables.dicts"), "DunderDictVariable", None)
    if own is not None:
        own.install_dict_contains_guard = _guard_own_dict
    guards = importlib.import_module("torch._dynamo.guards")
    measure = getattr(guards, "profile_guard_manager", None)
    if measure is not None:
        guards.profile_guard_manager = lambda *given: 0.0 if _on else measure(*given)  # pyright: ignore


def _noting(method: Callable[..., Any], error: type[Exception], note: Callable[..., None]) -> Callable[..., Any]:
    """The method of a variable of Dynamo's; where it raises the error, what it did not find is guarded."""

    @functools.wraps(method)
    def noting(self: Any, tx: Any, what: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, tx, what, *args, **kwargs)
        except error:
            if _on:
                note(self, tx, what)
            raise

    return noting


def _guard_attribute(variable: Any, _tx: Any, name: str) -> None:
    if variable.source:
        _set(variable, "HASATTR", attr=name)


def _guard_item(variable: Any, tx: Any, key: Any) -> None:
    variable.install_dict_contains_guard(tx, [key])


def _guard_own_dict(variable: Any, _tx: Any, args: Any) -> None:
    """Guard whether a key is in the `__dict__` of an object, as it is before the call."""
    if _on and variable.source and args[0].is_python_constant():
        key = args[0].as_python_constant()
        _set(variable, "DICT_CONTAINS" if key in variable.items.item_dict else "DICT_NOT_CONTAINS", key=key)


def _set(variable: Any, kind: str, **what: Any) -> None:
    guards = importlib.import_module("torch._dynamo.guards")
    guards.install_guard(variable.source.make_guard(functools.partial(getattr(guards.GuardBuilder, kind), **what)))
