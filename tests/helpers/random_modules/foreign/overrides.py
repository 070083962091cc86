"""Questions about the type of a tensor, tensor subclasses, and modes that intercept operations."""

from __future__ import annotations

import builtins
import contextlib
import functools
import random
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .base import VALUES, Foreign
from .harness import watch

CALLS: list[str] = []
FACTOR = VALUES[0]
watch("intercepted calls", sys.modules[__name__], "CALLS")
watch("factor of the modes", sys.modules[__name__], "FACTOR")
KIND, IS = type, isinstance


@functools.singledispatch
def _by_type(x: Any) -> Any:
    return x * 3


@_by_type.register
def _(x: Tensor) -> Tensor:
    return x.relu()


class TypeChecks(Foreign):
    """Another computation where the argument is a plain tensor."""

    def class_attribute(self, y: Tensor) -> Tensor:
        return y.relu() if y.__class__ is torch.Tensor else y.tanh()

    def other_name(self, y: Tensor) -> Tensor:
        return y.relu() if KIND(y) is Tensor else y.tanh()

    def builtin(self, y: Tensor) -> Tensor:
        return y.relu() if builtins.type(y) == torch.Tensor else y.tanh()  # noqa: E721

    def isinstance_alias(self, y: Tensor) -> Tensor:
        return y.relu() if IS(y, (list, Tensor)) else y.tanh()

    def name_of_type(self, y: Tensor) -> Tensor:
        return {"Tensor": y.relu}.get(type(y).__name__, y.tanh)()

    def in_tuple(self, y: Tensor) -> Tensor:
        return y.relu() if type(y) in (torch.Tensor, nn.Parameter) else y.tanh()

    def method_order(self, y: Tensor) -> Tensor:
        return y * len(type(y).__mro__)

    def legacy_type(self, y: Tensor) -> Tensor:
        return y.relu() if y.type() == "torch.DoubleTensor" else y.tanh()

    def single_dispatch(self, y: Tensor) -> Tensor:
        return _by_type(y)

    def class_pattern(self, y: Tensor) -> Tensor:
        match y:
            case torch.Tensor(ndim=4):
                return y.relu()
            case _:
                return y.tanh()

    def keyed_by_type(self, y: Tensor) -> Tensor:
        return {torch.Tensor: torch.relu, nn.Parameter: torch.tanh}[type(y)](y)

    def subclass(self, y: Tensor) -> Tensor:
        return y.relu() if issubclass(y.__class__, torch.Tensor) and torch.is_tensor(y) else y.tanh()

    def exact_weight(self, y: Tensor) -> Tensor:
        return y.relu() if type(self.conv.weight) is nn.Parameter else y.tanh()

    def attributes_of_it(self, y: Tensor) -> Tensor:
        return y.relu() if hasattr(y, "elem") or "fake" in repr(type(y)).lower() else y.tanh()


class DoubledConvolution(nn.Parameter):
    """A parameter that doubles the result of convolutions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * FACTOR if func is F.conv2d or func is torch.conv2d else result


class CountedParameter(nn.Parameter):
    """A parameter that reports the convolutions that use it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "conv2d":
            CALLS.append("conv2d")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class NamedParameter(nn.Parameter):
    """A parameter with a class of its own, that changes nothing."""


class TaggedTensor(Tensor):
    """A subclass that all results inherit."""


class SubclassedWeight(Foreign):
    """A weight with a class of its own on a convolution."""

    def setup(self, width: int, dice: random.Random) -> None:
        kinds = {"doubled": DoubledConvolution, "counted": CountedParameter, "named": NamedParameter}
        if self.how in kinds:
            self.conv.weight = kinds[self.how](self.conv.weight.detach())
        self.tag = nn.Parameter(torch.rand(width, 1, 1))

    def doubled(self, y: Tensor) -> Tensor:
        return y.relu()

    def counted(self, y: Tensor) -> Tensor:
        return y.relu()

    def named(self, y: Tensor) -> Tensor:
        return y.relu()

    def tagged_map(self, y: Tensor) -> Tensor:
        z = y.as_subclass(TaggedTensor) * 2
        return z.as_subclass(Tensor) * (2 if type(z) is TaggedTensor else 3)

    def tagged_weight(self, y: Tensor) -> Tensor:
        return (y * self.tag.as_subclass(TaggedTensor)).as_subclass(Tensor)

    def change(self, net: nn.Module, number: int) -> None:
        global FACTOR
        FACTOR = VALUES[number]
        if self.how == "named" and number == 2:
            self.conv.weight = DoubledConvolution(self.conv.weight.detach())


class _Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func):
            CALLS.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class _Scaling(TorchDispatchMode):
    """Scales the result of convolutions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * FACTOR if func is torch.ops.aten.convolution.default else result


class _CountingCalls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("conv2d", "tanh"):
            CALLS.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _ScalingCalls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * FACTOR if getattr(func, "__name__", "") == "conv2d" else result


_MODES = {
    "counting": _Counting,
    "scaling": _Scaling,
    "counting_calls": _CountingCalls,
    "scaling_calls": _ScalingCalls,
}


class ModeInForward(Foreign):
    """A mode that the forward enters."""

    variations = (*_MODES, "device", "disabled", "disabled_subclass", "kept_mode")

    def setup(self, width: int, dice: random.Random) -> None:
        self.second, self.mode = nn.Conv2d(width, width, 3, padding=1), _ScalingCalls()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "device":
            with torch.device("cpu"):
                return self.second(y) + torch.ones(1, dtype=y.dtype)
        if self.how == "disabled":
            with torch._C.DisableTorchFunction():
                return self.second(y).tanh()
        if self.how == "disabled_subclass":
            with torch._C.DisableTorchFunctionSubclass():
                return self.second(y).tanh()
        with self.mode if self.how == "kept_mode" else _MODES[self.how]():
            return self.second(y).tanh()

    def change(self, net: nn.Module, number: int) -> None:
        global FACTOR
        FACTOR = VALUES[number]


class ModeAroundCall(Foreign):
    """A mode in which the user calls the network."""

    variations = (*_MODES, "autocast", "device", "disabled", "saved_tensors_disabled", "detect_anomaly", "sometimes")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).tanh()
        return y.relu() if torch.is_autocast_enabled("cpu") else y

    def around(self) -> contextlib.AbstractContextManager[Any]:
        others = {
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "device": lambda: torch.device("cpu"),
            "disabled": torch._C.DisableTorchFunction,
            "saved_tensors_disabled": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
            "detect_anomaly": lambda: torch.autograd.set_detect_anomaly(True),
            "sometimes": _ScalingCalls if VALUES[0] != FACTOR else contextlib.nullcontext,
        }
        return (_MODES | others)[self.how]()

    def change(self, net: nn.Module, number: int) -> None:
        global FACTOR
        FACTOR = VALUES[number]
