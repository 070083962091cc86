"""Logs of TorchDynamo's that cost memory, left out while it records a network."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator

_on: list[None] = []  # an item for each context that is open


@contextlib.contextmanager
def less_logged() -> Iterator[None]:
    """No names of functions for Dynamo's log of calls, which is off.

    To find them it takes each source file apart into tokens, 40 MB for the moment, and keeps the names.
    """
    _install()
    _on.append(None)
    try:
        yield
    finally:
        _on.pop()


@functools.cache
def _install() -> None:
    convert = importlib.import_module("torch._dynamo.symbolic_convert")
    name = getattr(convert, "get_funcname", None)
    if name is not None:
        convert.get_funcname = lambda *where: None if _on else name(*where)  # pyright: ignore[reportAttributeAccessIssue]
