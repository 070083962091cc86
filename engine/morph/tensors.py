"""A network's tensors by name, and copies of a network with other tensors in the same places."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Shapes = tuple[torch.Size, torch.Size]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, shared ones under every name."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def of_kind(tensor: Tensor, value: Tensor) -> Tensor:
    """`value` as a parameter if `tensor` is one."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def channels_last(tensor: Tensor) -> torch.memory_format | None:
    """The memory format with channels last in which a convolution's weight lies, if it does."""
    format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    lies = format is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=format)
    return format if lies else None


def as_ordered(new: nn.Module, model: nn.Module) -> nn.Module:
    """`new` with channels last in memory where a weight of the model has them so."""
    for order in dict.fromkeys(channels_last(p) for p in model.parameters()):
        new = new if order is None else new.to(memory_format=order)  # pyright: ignore[reportCallIssue]
    return new


def fill(child: nn.Module, parent: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put `make(t)` where the parent, of the same modules, has t; tensors that are shared there are shared here."""
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
    """Of a module's own tensors whose shape is another than in `source`: the old shape and the new one."""
    shapes: dict[str, Shapes] = {}
    for new, old in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
        for key, before in old.items():
            after = new.get(key)
            if before is not None and after is not None and after.shape != before.shape:
                shapes[key] = before.shape, after.shape
    return shapes
