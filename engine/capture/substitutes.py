"""Calls that Dynamo records by another name, since it cannot find the result's shape of the call itself.

`F.batch_norm` of a norm whose running statistics are means over all batches (`momentum=None`): its momentum comes of a
counter, a number without a value. Recurrent layers: without values PyTorch goes through every step of a sequence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .recurrent import LAYERS, of_one_step

_SIGNATURE = inspect.signature(F.batch_norm)
_on: list[None] = []  # an item for each context that is open


def batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """`F.batch_norm`, whose momentum may be a number without a value while Dynamo records it."""
    given = _SIGNATURE.bind(*args, **kwargs)
    if isinstance(given.arguments.get("momentum"), torch.SymFloat):
        given.arguments["momentum"] = 0.1
    return F.batch_norm(*given.args, **given.kwargs)


def _has_no_value(args: Any, kwargs: Any) -> bool:
    momentum = _SIGNATURE.bind(*args, **kwargs).arguments.get("momentum")
    return type(momentum).__name__ == "SymNodeVariable"


def _layer(name: str) -> Callable[..., Any]:
    """A recurrent layer's call under the name by which `higher_order.CALLED` knows it."""
    func = getattr(torch, name)

    def layer(*args: Any, **kwargs: Any) -> Any:
        result = of_one_step(name, func, args, kwargs)
        return func(*args, **kwargs) if result is None else result

    layer.__name__ = layer.__qualname__ = name
    return layer


@contextlib.contextmanager
def substitutes() -> Iterator[None]:
    """What Dynamo records meanwhile."""
    _install()
    _on.append(None)
    try:
        yield
    finally:
        _on.pop()


@functools.cache
def _install() -> None:
    """Add to the calls that Dynamo handles by themselves; without a context it does what it did."""
    _substitute(F.batch_norm, batch_norm, _has_no_value)
    for name in LAYERS:
        _substitute(getattr(torch, name), _layer(name), lambda args, kwargs: True)


def _substitute(function: Any, other: Callable[..., Any], applies: Callable[[Any, Any], bool]) -> None:
    torch.compiler.allow_in_graph(other)
    calls = importlib.import_module("torch._dynamo.variables").TorchInGraphFunctionVariable

    def record(_variable: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not _on or not applies(args, kwargs):
            return None
        return calls(other).call_function(tx, list(args), kwargs)

    calls._get_handlers().setdefault(function, record)
