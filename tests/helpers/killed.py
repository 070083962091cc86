"""A training that ends in its midst."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gigamorph.engine.train.task import Task


@contextlib.contextmanager
def killed_at(kind: type[Task], nth: int | Callable[[Any], int]) -> Iterator[None]:
    """What runs inside must end where a task of this kind is asked for its loss for the nth time (of a task)."""
    loss, calls = kind.loss, []

    def killed(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == (nth if isinstance(nth, int) else nth(self)):
            raise RuntimeError("killed")
        return loss(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(kind, "loss", killed)
        yield
