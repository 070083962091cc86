"""`is_recorded`: whether the running code is being recorded for a computation by tiles."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

_open = 0
_recorded = False  # Dynamo guards it, so it is a bool, not a count


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Mark code that Dynamo interprets inside the `with` block as recorded."""
    global _open, _recorded
    _substitute()
    _open, _recorded = _open + 1, True
    try:
        yield
    finally:
        _open -= 1
        _recorded = _open > 0


def is_recorded() -> bool:
    """Whether Dynamo interprets this call for a recording; false in other uses of `torch.compile`."""
    return _is_interpreted() and _recorded


def _is_interpreted() -> bool:
    """Whether Dynamo interprets this call; `torch.compiler.is_compiling()` is false in a recording, as in stock."""
    return False


@functools.cache
def _substitute() -> None:
    """Register `_is_interpreted` with Dynamo, whose import takes a second."""

    @torch.compiler.substitute_in_graph(_is_interpreted)
    def is_interpreted() -> bool:
        return True
