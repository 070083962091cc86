"""What a network is called with: an example's tensors, their places among the arguments, and other values for them."""

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
        tensors: all tensors among them, in order.
        form: where they are, as plain data: positional and keyword arguments with {"tensor": i} for each. None: they
            are the positional arguments. {"calls": [...]}: such a form for each of several calls.
    """

    tensors: tuple[Tensor, ...]
    form: Any = None

    def call(self, model: nn.Module, tensors: Sequence[Tensor] | None = None) -> Any:
        """The model's result for these arguments, or for other tensors in their places."""
        given = self.tensors if tensors is None else tensors
        if self.form is None:
            return model(*given)
        if "calls" in self.form:
            return [Inputs(self.tensors, form).call(model, given) for form in self.form["calls"]]
        args, kwargs = _decoded(self.form, given)
        return model(*args, **kwargs)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the tensors."""
        return tuple(tuple(x.shape) for x in self.tensors)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Their dtypes by name, as a step keeps them; none if all are floating, whose precision does not matter."""
        if all(x.is_floating_point() for x in self.tensors):
            return ()
        return tuple(str(x.dtype).removeprefix("torch.") for x in self.tensors)

    @property
    def batch(self) -> int:
        """Length of the batch: the first tensor's."""
        first = self.tensors[0]
        return first.shape[0] if first.ndim else 1

    def first(self) -> Inputs:
        """The first of the batch; a tensor of another length belongs to no batch."""
        if self.form is not None and "calls" in self.form:
            return self
        return replace(self, tensors=tuple(x[:1] if self.batched(x) else x for x in self.tensors))

    def and_calls(self, others: Sequence[Inputs]) -> Inputs:
        """One call with the first of the batch, and one with each of the others, one after the other."""
        if not others:
            return self
        tensors: list[Tensor] = []
        calls = []
        for one in (self.first(), *others):
            args, kwargs = (one.tensors, {}) if one.form is None else _decoded(one.form, one.tensors)
            calls.append({"args": [_encoded(x, tensors) for x in args], "kwargs": _encoded(kwargs, tensors)["dict"]})
        return Inputs(tuple(tensors), {"calls": calls})

    def to(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Copies that a forward may write to, floating ones in that dtype."""
        return tuple(x.to(dtype, copy=True) if x.is_floating_point() else x.clone() for x in self.tensors)

    def random(self, seed: int, batch: int = 1) -> Inputs:
        """Normal random numbers, float64, for at least `batch` examples; integers stay what they are."""
        generator = torch.Generator().manual_seed(seed)

        def draw(x: Tensor, repeats: int) -> Tensor:
            if not x.is_floating_point():
                return torch.cat([x] * repeats) if repeats > 1 else x
            shape = (x.shape[0] * repeats, *x.shape[1:]) if x.ndim else ()
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device)

        return self._drawn(draw, batch)

    def own(self, seed: int, batch: int = 1) -> Inputs:
        """The example's own values, float64; of further examples of a batch each value shrunk by up to a half."""
        generator = torch.Generator().manual_seed(seed)

        def draw(x: Tensor, repeats: int) -> Tensor:
            if not x.is_floating_point():
                return torch.cat([x] * repeats) if repeats > 1 else x
            shares = [1 - torch.rand(x.shape, generator=generator, dtype=torch.float64) / 2 for _ in range(1, repeats)]
            return torch.cat([x.double(), *(x.double() * share.to(x.device) for share in shares)]) if shares else x

        return self._drawn(draw, batch)

    def _drawn(self, draw: Any, batch: int) -> Inputs:
        repeats = -(-batch // max(self.batch, 1))
        return replace(self, tensors=tuple(draw(x, repeats if self.batched(x) else 1) for x in self.tensors))

    def batched(self, x: Tensor) -> bool:
        """Whether it has one entry for each example of the batch."""
        return x.ndim > 0 and x.shape[0] == self.batch


Example = Tensor | Sequence[Any] | Mapping[str, Any] | Inputs


def as_inputs(example: Example) -> Inputs:
    """The arguments that an example stands for: a tensor, a tuple or list of positional, a dict of keyword arguments.

    Tensors may stand inside of lists and dicts, beside numbers, texts and None.

    Raises:
        MorphError: anything else is among them, or no tensor, or one without elements.
    """
    found = _inputs_of(example)
    for x in found.tensors:
        if x.numel() == 0:
            raise MorphError(f"the example has a tensor of {tuple(x.shape)}, without elements; give at least one image")
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
    form = {
        "args": [_encoded(x, tensors) for x in args],
        "kwargs": {k: _encoded(x, tensors) for k, x in kwargs.items()},
    }
    if not tensors:
        raise MorphError("there is no tensor in the example; give the network's inputs")
    return Inputs(tuple(tensors), None if len(tensors) == len(args) and _all_tensors(args) else form)


def stand_ins(shapes: Sequence[Sequence[int]], kinds: Sequence[str], form: Any) -> Inputs:
    """Inputs of these shapes, `kinds` and form: random numbers on the CPU, zeros where they are no floating ones."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [getattr(torch, kind) for kind in kinds] or [torch.float32] * len(shapes)
    tensors = tuple(
        torch.randn(tuple(shape), generator=generator) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return Inputs(tensors, form)


def _all_tensors(args: list[Any]) -> bool:
    return all(isinstance(x, Tensor) for x in args)


def _encoded(value: Any, tensors: list[Tensor]) -> Any:
    """As plain data; a tensor goes to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, tuple | list):
        return {"list": [_encoded(v, tensors) for v in value]}
    if isinstance(value, Mapping):
        return {"dict": {str(k): _encoded(v, tensors) for k, v in value.items()}}
    if not isinstance(value, PLAIN) or (isinstance(value, float) and not math.isfinite(value)):
        raise MorphError(
            f"there is a {type(value).__name__} in the example; tensors, numbers, texts, None, and lists and dicts of "
            "these can be"
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
