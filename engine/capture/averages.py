"""Norms whose running statistics are means over all batches (`momentum=None`), as Dynamo records them.

Such a norm takes its momentum from a counter of batches, which Dynamo knows as a number without a value. The call that
it makes to find the result's shape needs a value: any.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_SIGNATURE = inspect.signature(F.batch_norm)
_on: list[None] = []  # an item for each context that is open


def batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """`F.batch_norm`, whose momentum may be a number without a value while Dynamo records it."""
    given = _SIGNATURE.bind(*args, **kwargs)
    if isinstance(given.arguments.get("momentum"), torch.SymFloat):
        given.arguments["momentum"] = 0.1
    return F.batch_norm(*given.args, **given.kwargs)


@contextlib.contextmanager
def averages() -> Iterator[None]:
    """Dynamo records `batch_norm` in the place of `F.batch_norm` where the momentum is such a number."""
    _install()
    _on.append(None)
    try:
        yield
    finally:
        _on.pop()


@functools.cache
def _install() -> None:
    """Add to the calls that Dynamo handles by themselves; without a context it does what it did."""
    torch.compiler.allow_in_graph(batch_norm)
    variables = importlib.import_module("torch._dynamo.variables")
    calls = variables.TorchInGraphFunctionVariable

    def record(_variable: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        momentum = _SIGNATURE.bind(*args, **kwargs).arguments.get("momentum") if _on else None
        if not isinstance(momentum, variables.SymNodeVariable):
            return None
        return calls(batch_norm).call_function(tx, list(args), kwargs)

    calls._get_handlers().setdefault(F.batch_norm, record)
