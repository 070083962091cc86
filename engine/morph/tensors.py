"""Tensors of a network by name, and replacement of a network's tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Shapes = tuple[torch.Size, torch.Size]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers; shared ones appear under every name."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def of_kind(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value` as a parameter if `tensor` is a parameter."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def channels_last(tensor: Tensor) -> torch.memory_format | None:
    """Return the channels-last memory format of a convolution's weight; None if it has another format."""
    format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    is_last = format is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=format)
    return format if is_last else None


def as_ordered(new: nn.Module, model: nn.Module) -> nn.Module:
    """Convert `new` to channels-last formats that weights of the model have."""
    for order in dict.fromkeys(channels_last(p) for p in model.parameters()):
        new = new if order is None else new.to(memory_format=order)  # pyright: ignore[reportCallIssue]
    return new


def fill(child: nn.Module, parent: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Set each tensor of the child to `make(t)` of the parent's tensor t; shared tensors stay shared."""
    made: dict[int, Tensor] = {}
    for module, source in zip(child.modules(), parent.modules(), strict=True):
        for store, old in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
            for key, tensor in old.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    value = make(tensor)
                    made[id(tensor)] = value if value is tensor else of_kind(tensor, value)
                store[key] = made[id(tensor)]  # pyright: ignore[reportArgumentType]


def resized(module: nn.Module, source: nn.Module) -> dict[str, Shapes]:
    """Return old and new shape of each of a module's own tensors with another shape than in `source`."""
    shapes: dict[str, Shapes] = {}
    for new, old in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
        for key, before in old.items():
            after = new.get(key)
            if before is not None and after is not None and after.shape != before.shape:
                shapes[key] = before.shape, after.shape
    return shapes
