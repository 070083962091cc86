"""Running a network: the tensors that it returns, eval mode, any error as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..errors import GigamorphError, MorphError


def output_leaves(result: Any) -> list[Any]:
    """What a network returns, flat: tensors and plain values, and the tensors that any other object in it holds."""
    leaves: list[Any] = []
    for leaf in tree_flatten(result)[0]:
        leaves += _held(leaf, set()) if _is_holder(leaf) else [leaf]
    return leaves


def output_tensors(result: Any) -> list[Tensor]:
    """The tensors among the `output_leaves`.

    Raises:
        MorphError: there is none, so that nothing could be compared.
    """
    tensors = [leaf for leaf in output_leaves(result) if isinstance(leaf, Tensor)]
    if not tensors:
        raise MorphError(
            f"the network returns a {type(result).__name__} without a tensor that could be compared; let it return "
            "tensors, alone or in tuples, lists, dictionaries or dataclasses"
        )
    return tensors


def _is_holder(leaf: Any) -> bool:
    """Whether there can be tensors in its attributes."""
    plain = leaf is None or isinstance(leaf, Tensor | bool | int | float | complex | str | bytes | type)
    return not plain and (hasattr(leaf, "__dict__") or hasattr(type(leaf), "__slots__"))


def _held(holder: Any, seen: set[int]) -> list[Tensor]:
    """The tensors in an object's attributes, in their order."""
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
    """Every module in eval mode, and back to the mode each was in."""
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
    """Whatever the network's code raises, as a MorphError `what`: its first line.

    Raises:
        MorphError: see above; our own errors pass as they are.
    """
    try:
        yield
    except GigamorphError:
        raise
    except Exception as error:
        raise MorphError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """An error's first line of text, or its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
