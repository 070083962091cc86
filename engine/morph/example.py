"""Arguments of a network: an example's tensors, their positions among the arguments, and other values for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MorphError

PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Inputs:
    """The arguments of a call.

    Attributes:
        tensors: all tensors among the arguments, in order.
        form: the arguments as plain data, positional and keyword ones, with {"tensor": i} for each tensor. None: the
            tensors are the positional arguments. {"calls": [...]}: one form for each of several calls.
    """

    tensors: tuple[Tensor, ...]
    form: Any = None

    def call(self, model: nn.Module, tensors: Sequence[Tensor] | None = None) -> Any:
        """Call the model with these arguments, or with other tensors at their positions, and return its result."""
        given = self.tensors if tensors is None else tensors
        if self.form is None:
            return model(*given)
        if "calls" in self.form:
            return [Inputs(self.tensors, form).call(model, given) for form in self.form["calls"]]
        args, kwargs = _decoded(self.form, given)
        return model(*args, **kwargs)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors."""
        return tuple(tuple(x.shape) for x in self.tensors)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the dtypes, as a step stores them; empty if all are floating, because their precision is free."""
        if all(x.is_floating_point() for x in self.tensors):
            return ()
        return tuple(str(x.dtype).removeprefix("torch.") for x in self.tensors)

    @property
    def batch(self) -> int:
        """Batch size: the length of the first tensor."""
        first = self.tensors[0]
        return first.shape[0] if first.ndim else 1

    def first(self) -> Inputs:
        """Return the first example of the batch; tensors of another length stay whole."""
        if self.form is not None and "calls" in self.form:
            return self
        return replace(self, tensors=tuple(x[:1] if self.batched(x) else x for x in self.tensors))

    def and_calls(self, others: Sequence[Inputs]) -> Inputs:
        """Return inputs of several calls in sequence: the first example of the batch, then each of the others."""
        if not others:
            return self
        tensors: list[Tensor] = []
        calls = []
        for one in (self.first(), *others):
            args, kwargs = (one.tensors, {}) if one.form is None else _decoded(one.form, one.tensors)
            calls.append(_form(args, kwargs, tensors))
        return Inputs(tuple(tensors), {"calls": calls})

    def to(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return copies of the tensors that a forward may write to, floating ones in `dtype`."""
        return tuple(x.to(dtype, copy=True) if x.is_floating_point() else x.clone() for x in self.tensors)

    def random(self, seed: int, batch: int = 1) -> Inputs:
        """Return normal random numbers in float64 for at least `batch` examples; integers do not change."""
        generator = torch.Generator().manual_seed(seed)

        def draw(x: Tensor, repeats: int) -> Tensor:
            shape = (x.shape[0] * repeats, *x.shape[1:]) if x.ndim else ()
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device)

        return self._drawn(draw, batch)

    def own(self, seed: int, batch: int = 1) -> Inputs:
        """Return the example's values in float64; further examples of the batch shrink each value by up to a half."""
        generator = torch.Generator().manual_seed(seed)

        def draw(x: Tensor, repeats: int) -> Tensor:
            shares = [1 - torch.rand(x.shape, generator=generator, dtype=torch.float64) / 2 for _ in range(1, repeats)]
            return torch.cat([x.double(), *(x.double() * share.to(x.device) for share in shares)]) if shares else x

        return self._drawn(draw, batch)

    def _drawn(self, draw: Any, batch: int) -> Inputs:
        whole = -(-batch // max(self.batch, 1))

        def value(x: Tensor) -> Tensor:
            repeats = whole if self.batched(x) else 1
            if x.is_floating_point():
                return draw(x, repeats)
            return torch.cat([x] * repeats) if repeats > 1 else x

        return replace(self, tensors=tuple(map(value, self.tensors)))

    def batched(self, x: Tensor) -> bool:
        """Return whether the tensor has one entry for each example of the batch."""
        return x.ndim > 0 and x.shape[0] == self.batch


Example = Tensor | Sequence[Any] | Mapping[str, Any] | Inputs


def as_inputs(example: Example) -> Inputs:
    """Convert an example to `Inputs`.

    It is a tensor, a tuple or list of positional arguments, or a dict of keyword arguments. Lists and dicts may contain
    tensors, numbers, strings and None.

    Raises:
        MorphError: the example contains another type, no tensor, or a tensor without elements.
    """
    found = _inputs_of(example)
    for x in found.tensors:
        if x.numel() == 0:
            raise MorphError(f"the example has an empty tensor of shape {tuple(x.shape)}; give at least one image")
    return found


def _inputs_of(example: Example) -> Inputs:
    if isinstance(example, Inputs):
        return example
    if isinstance(example, Tensor):
        return Inputs((example,))
    if isinstance(example, Mapping):
        args, kwargs = [], dict(example)
    elif isinstance(example, tuple | list):
        args, kwargs = list(example), {}
    else:
        raise MorphError(
            f"the example is a {type(example).__name__}; give a tensor, a tuple of all inputs in order, or a dict of "
            "keyword arguments"
        )
    tensors: list[Tensor] = []
    form = _form(args, kwargs, tensors)
    if not tensors:
        raise MorphError("the example contains no tensor; give the network's inputs")
    plain = len(tensors) == len(args) and all(isinstance(x, Tensor) for x in args)
    return Inputs(tuple(tensors), None if plain else form)


def stand_ins(shapes: Sequence[Sequence[int]], kinds: Sequence[str], form: Any) -> Inputs:
    """Create inputs of these shapes, `kinds` and form on the CPU: random numbers, or zeros for other than floats."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [getattr(torch, kind) for kind in kinds] or [torch.float32] * len(shapes)
    tensors = tuple(
        torch.randn(tuple(shape), generator=generator) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return Inputs(tensors, form)


def _form(args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[Tensor]) -> dict[str, Any]:
    """Encode the arguments of a call; their tensors are appended to `tensors`."""
    return {"args": [_encoded(x, tensors) for x in args], "kwargs": _encoded(kwargs, tensors)["dict"]}


def _encoded(value: Any, tensors: list[Tensor]) -> Any:
    """Encode a value as plain data; its tensors are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, tuple | list):
        return {"list": [_encoded(v, tensors) for v in value]}
    if isinstance(value, Mapping):
        return {"dict": {str(k): _encoded(v, tensors) for k, v in value.items()}}
    if not isinstance(value, PLAIN) or (isinstance(value, float) and not math.isfinite(value)):
        raise MorphError(
            f"the example contains a {type(value).__name__}; use tensors, numbers, strings, None, and lists and dicts "
            "of these"
        )
    return value


def _decoded(form: Mapping[str, Any], tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
    def value(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        if "tensor" in part:
            return tensors[part["tensor"]]
        if "list" in part:
            return [value(p) for p in part["list"]]
        return {k: value(p) for k, p in part["dict"].items()}

    return [value(p) for p in form["args"]], {k: value(p) for k, p in form["kwargs"].items()}
