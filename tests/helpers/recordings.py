"""How often a network is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gigamorph.engine.capture import dynamo


@contextlib.contextmanager
def recordings(noted: Callable[[], Any] = int) -> Iterator[list[Any]]:
    """What `noted` gives at each graph that Dynamo hands over meanwhile."""
    found: list[Any] = []
    of = dynamo.Graph.of

    def counting(module: Any) -> dynamo.Graph:
        found.append(noted())
        return of(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamo.Graph, "of", counting)
        yield found
