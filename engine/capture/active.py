"""Whether the code that runs is recorded for a computation by tiles."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

_open = 0
_recorded = False  # Dynamo guards it: a truth value, and no number


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """What Dynamo interprets meanwhile is recorded."""
    global _open, _recorded
    _substitute()
    _open, _recorded = _open + 1, True
    try:
        yield
    finally:
        _open -= 1
        _recorded = _open > 0


def is_recorded() -> bool:
    """Whether Dynamo interprets this call for a recording; in `torch.compile` of another's it does not."""
    return _is_interpreted() and _recorded


def _is_interpreted() -> bool:
    """Whether Dynamo interprets this call; `torch.compiler.is_compiling()` says no in a recording, as in stock."""
    return False


@functools.cache
def _substitute() -> None:
    """Say so to Dynamo, which takes a second to import."""

    @torch.compiler.substitute_in_graph(_is_interpreted)
    def is_interpreted() -> bool:
        return True
