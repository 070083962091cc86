"""Search for a library function that builds a grown network: ResNet-50 widened inside blocks is wide_resnet50_2."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MOST = 40  # maximum number of functions to try; each builds a network without memory


def standard_name(network: nn.Module) -> str:
    """Return the name of the function that builds the same network; "" if there is none.

    It searches the module that defines the network's class, and calls functions with `num_classes` only. Networks are
    the same if names and shapes of all parameters and the printed layers are equal.
    """
    module = sys.modules.get(type(network).__module__)
    shapes = {name: t.shape for name, t in network.state_dict().items()}
    outputs = [shape[0] for name, shape in shapes.items() if name.endswith("weight") and len(shape) >= 2][-1:]
    for name, build in _builders(module):
        try:
            with torch.device("meta"), _Unfilled():
                made = build(num_classes=outputs[0]) if outputs else build()
        except Exception:  # it needs other arguments, or cannot build without memory
            continue
        if type(made) is not type(network) or {n: t.shape for n, t in made.state_dict().items()} != shapes:
            continue
        if str(made) == str(network):
            return f"{type(network).__module__}.{name}"
    return ""


class _Unfilled(TorchFunctionMode):
    """Function mode that skips filling tensors, which is most of the construction time of a network without memory."""

    FILLS = frozenset("uniform_ normal_ fill_ zero_ copy_ erfinv_ mul_ add_ sub_ div_ clamp_".split())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.FILLS and args and isinstance(args[0], Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def _builders(module: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    found = [
        (name, f)
        for name, f in vars(module).items()
        if inspect.isfunction(f) and not name.startswith("_") and f.__module__ == module.__name__
    ]
    yield from found if len(found) <= MOST else []
