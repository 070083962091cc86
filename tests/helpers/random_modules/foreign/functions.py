"""Custom autograd functions, called under another name."""

from __future__ import annotations

import functools
import importlib
import random
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import library
from .base import VALUES, Foreign
from .harness import watch
from .library import Gate, GradientReversal, LeakyStep, gate, reverse, step

CALLS: list[str] = []
FUNCTIONS = {"reverse": GradientReversal.apply, "step": LeakyStep.apply}
rev = GradientReversal.apply
watch("strength of the reversal", GradientReversal, "strength")
watch("calls of functions", sys.modules[__name__], "CALLS")
watch("functions by name", sys.modules[__name__], "FUNCTIONS")

_MODULE = types.ModuleType("gigamorph_foreign_functions")
_MODULE.rev = GradientReversal.apply
sys.modules[_MODULE.__name__] = _MODULE


class AliasedFunction(Foreign):
    """`rev = Function.apply`, kept in many places, on a map."""

    rev = GradientReversal.apply
    table: ClassVar = {"rev": GradientReversal.apply, "step": LeakyStep.apply}

    def setup(self, width: int, dice: random.Random) -> None:
        if self.how == "on_instance":
            self.own = GradientReversal.apply
        if self.how == "partial":
            self.own = functools.partial(GradientReversal.apply)
        if self.how == "in_list":
            self.own = [torch.tanh, GradientReversal.apply]

    def module_level(self, y: Tensor) -> Tensor:
        return rev(y)

    def class_level(self, y: Tensor) -> Tensor:
        return type(self).rev(y)

    def class_level_by_self(self, y: Tensor) -> Tensor:
        return self.rev(y)

    def in_dictionary(self, y: Tensor) -> Tensor:
        return self.table["rev"](y)

    def in_list(self, y: Tensor) -> Tensor:
        for call in self.own:
            y = call(y)
        return y

    def default_argument(self, y: Tensor, call: Callable[..., Any] = GradientReversal.apply) -> Tensor:
        return call(y)

    def from_import(self, y: Tensor) -> Tensor:
        return reverse(y)

    def from_module_object(self, y: Tensor) -> Tensor:
        from gigamorph_foreign_functions import rev as other

        return other(y)

    def imported_by_name(self, y: Tensor) -> Tensor:
        return importlib.import_module(_MODULE.__name__).rev(y)

    def module_attribute(self, y: Tensor) -> Tensor:
        return library.reverse(y)

    def on_instance(self, y: Tensor) -> Tensor:
        return self.own(y)

    def partial(self, y: Tensor) -> Tensor:
        return self.own(y)

    def local_name(self, y: Tensor) -> Tensor:
        call = GradientReversal.apply
        return call(y.relu())

    def mapped(self, y: Tensor) -> Tensor:
        return torch.cat(list(map(rev, y.split(1, 1))), 1)

    def change(self, net: nn.Module, number: int) -> None:
        GradientReversal.strength = VALUES[number]  # which the backward reads


class AliasedGradient(Foreign):
    """An alias of a function whose gradient depends on what it saved."""

    def module_level(self, y: Tensor) -> Tensor:
        return step(y)

    def twice(self, y: Tensor) -> Tensor:
        return step(reverse(y)) + y

    def from_dictionary(self, y: Tensor) -> Tensor:
        return FUNCTIONS["step"](y)

    def replaced_in_dictionary(self, y: Tensor) -> Tensor:
        return FUNCTIONS["reverse"](y)

    def by_getattr(self, y: Tensor) -> Tensor:
        return getattr(library, "st" + "ep")(y)

    def change(self, net: nn.Module, number: int) -> None:
        if self.how == "replaced_in_dictionary":
            FUNCTIONS["reverse"] = (LeakyStep.apply, GradientReversal.apply)[number - 1]


class AliasedGate(Foreign):
    """An alias with two tensor inputs."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second, self.scale = nn.Conv2d(width, width, 1), nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def two_maps(self, y: Tensor) -> Tensor:
        return gate(y, self.second(y))

    def same_map(self, y: Tensor) -> Tensor:
        return gate(y, y)

    def pooled_vector(self, y: Tensor) -> Tensor:
        return gate(y, y.mean((2, 3), keepdim=True))

    def parameter(self, y: Tensor) -> Tensor:
        return gate(y, self.scale)

    def no_gradient_for_one(self, y: Tensor) -> Tensor:
        return gate(y, self.scale.detach())

    def two_vectors(self, y: Tensor) -> Tensor:
        pooled = y.mean((2, 3), keepdim=True)
        return y + gate(pooled, self.second(pooled))


class FunctionOnParameter(Foreign):
    """An alias on parameters and on pooled vectors."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second, self.scale = nn.Conv2d(width, width, 3, padding=1), nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def kernel(self, y: Tensor) -> Tensor:
        return F.conv2d(y, step(self.second.weight), self.second.bias, padding=1)

    def bias(self, y: Tensor) -> Tensor:
        return F.conv2d(y, self.second.weight, rev(self.second.bias), padding=1)

    def scale_of_map(self, y: Tensor) -> Tensor:
        return y * reverse(self.scale)

    def product_of_parameters(self, y: Tensor) -> Tensor:
        return y * Gate.apply(self.scale, self.second.bias[:, None, None])

    def pooled(self, y: Tensor) -> Tensor:
        return y + rev(y.mean((2, 3)))[:, :, None, None]

    def pooled_maximum(self, y: Tensor) -> Tensor:
        return y * step(y.amax((2, 3), keepdim=True))

    def change(self, net: nn.Module, number: int) -> None:
        GradientReversal.strength = VALUES[number]


class _Recorded(torch.autograd.Function):
    """Reports its forwards and backwards to a list of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        CALLS.append(f"forward {name}")
        ctx.name = name
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        CALLS.append(f"backward {ctx.name}")
        return grad * 3, None


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x * 2, x.relu()

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return first if second is None else second * 0.5 if first is None else first + second


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.25


class _MeanRemoved(torch.autograd.Function):
    """Not of one pixel: its forward and its backward take means of the map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean((2, 3), keepdim=True) * 0.5


class _GradientScaledByItself(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / (grad.norm() + 1e-3)


class UnusualFunction(Foreign):
    """Functions with side effects, several results, writes in place, and means over the whole map."""

    def recorded(self, y: Tensor) -> Tensor:
        return _Recorded.apply(y, "map")

    def recorded_vector(self, y: Tensor) -> Tensor:
        return y + _Recorded.apply(y.mean((2, 3), keepdim=True), "vector")

    def pair(self, y: Tensor) -> Tensor:
        first, second = _Pair.apply(y)
        return first - second

    def half_of_a_pair(self, y: Tensor) -> Tensor:
        return _Pair.apply(y)[1]

    def in_place(self, y: Tensor) -> Tensor:
        return _InPlace.apply(y * 1.0)

    def mean_removed(self, y: Tensor) -> Tensor:
        return _MeanRemoved.apply(y)

    def normalized_gradient(self, y: Tensor) -> Tensor:
        return _GradientScaledByItself.apply(y)

    def made_in_the_forward(self, y: Tensor) -> Tensor:
        strength = self.conv.stride[0] * 0.5

        class Local(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.view_as(x)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad * strength

        return Local.apply(y)
