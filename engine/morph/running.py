"""Helpers to run a network: its output tensors, eval mode, errors in one line, and exact arithmetic for checks.

That arithmetic has no TF32 and no autocast, and is in float64 where a forward requests float32 by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GigamorphError, MorphError
from ..torch_private import TorchDispatchMode, tree_flatten


def output_leaves(result: Any) -> list[Any]:
    """Flatten the result of a network: tensors, plain values, and tensors in attributes of other objects."""
    leaves: list[Any] = []
    for leaf in tree_flatten(result)[0]:
        leaves += _held(leaf, set()) if _is_holder(leaf) else [leaf]
    return leaves


def output_tensors(result: Any) -> list[Tensor]:
    """Return the tensors among the `output_leaves`.

    Raises:
        MorphError: the result contains no tensor to compare.
    """
    tensors = [leaf for leaf in output_leaves(result) if isinstance(leaf, Tensor)]
    if not tensors:
        raise MorphError(
            f"the network returns a {type(result).__name__} without a tensor to compare; let it return tensors, "
            "directly or in tuples, lists, dictionaries or dataclasses"
        )
    return tensors


def _is_holder(leaf: Any) -> bool:
    """Return whether an object may have tensors in its attributes."""
    plain = leaf is None or isinstance(leaf, Tensor | bool | int | float | complex | str | bytes | type)
    return not plain and (hasattr(leaf, "__dict__") or hasattr(type(leaf), "__slots__"))


def _held(holder: Any, seen: set[int]) -> list[Tensor]:
    """Return the tensors in an object's attributes, in order."""
    seen.add(id(holder))
    slots = [name for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ())]
    values = [*getattr(holder, "__dict__", {}).values(), *(getattr(holder, name, None) for name in slots)]
    found: list[Tensor] = []
    for value in tree_flatten(values)[0]:
        if isinstance(value, Tensor):
            found.append(value)
        elif id(value) not in seen and _is_holder(value) and not callable(value):
            found += _held(value, seen)
    return found


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set every module to eval mode, and restore the mode of each afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Convert exceptions of the network's code to a MorphError of `what` and their first line.

    Raises:
        MorphError: the network's code raised an exception; errors of gigamorph are not converted.
    """
    try:
        yield
    except GigamorphError:
        raise
    except Exception as error:
        raise MorphError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32, autocast and similar settings; a Dirac convolution in TF32 would round its input to 10 bits."""
    backends: Any = torch.backends
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for s, old in zip(settings, before, strict=True):
            s.fp32_precision = old


@contextmanager
def in_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Let a network that was cast to float64 create and cast to float64 where its forward requests float32.

    This covers `x.float() / 255`, `torch.zeros(...)` and `dtype=torch.float32`. Other dtypes change nothing.
    """
    if dtype is not torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)


class _Doubles(TorchDispatchMode):
    """Dispatch mode, because a function mode would disable PyTorch's fast paths."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.ops.aten.lift_fresh.default and args[0].dtype == torch.float32:  # torch.tensor(an array)
            return args[0].double()
        return func(*args, **kwargs)
