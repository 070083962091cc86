"""Running a network: inputs from an example, the tensors that it returns, eval mode, any error as one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..errors import GigamorphError, MorphError

Example = Tensor | tuple[Tensor, ...]


def as_inputs(example: Example) -> tuple[Tensor, ...]:
    """The positional inputs that an example stands for.

    Raises:
        MorphError: it is neither a tensor nor a tuple or list of tensors.
    """
    if isinstance(example, Tensor):
        return (example,)
    if not isinstance(example, tuple | list):
        raise MorphError(f"the example is a {type(example).__name__}; give a tensor, or a tuple of all inputs in order")
    for i, x in enumerate(example):
        if not isinstance(x, Tensor):
            raise MorphError(f"input {i} of the example is a {type(x).__name__}; every input must be a tensor")
    return tuple(example)


def input_kinds(inputs: tuple[Tensor, ...]) -> tuple[str, ...]:
    """The dtypes of inputs by name, as a step keeps them; none if all are floating, whose precision does not matter."""
    if all(x.is_floating_point() for x in inputs):
        return ()
    return tuple(str(x.dtype).removeprefix("torch.") for x in inputs)


def stand_ins(shapes: Sequence[Sequence[int]], kinds: Sequence[str]) -> tuple[Tensor, ...]:
    """Inputs of these shapes and `input_kinds`: random numbers on the CPU, zeros where they are no floating ones."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [getattr(torch, kind) for kind in kinds] or [torch.float32] * len(shapes)
    return tuple(
        torch.randn(tuple(shape), generator=generator) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


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
