"""Tensors of a network by name, deep copies, and views that share parameters and cast them when they are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, ItemsView, Mapping, ValuesView
from typing import Any

import torch
from torch import Tensor, nn

_STORES = ("_parameters", "_buffers", "_modules")


def duplicate(model: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a deep copy, including tensors that hooks computed (the old `nn.utils.weight_norm`), without their graph.

    The copy shares objects that cannot be copied (a lock, an open file, a compiled function).

    Args:
        model: any network.
        shared: id of a tensor -> the object that the copy gets instead.
    """
    memo: dict[int, Any] = dict(shared or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(model, dict(memo))
    except (TypeError, NotImplementedError, AttributeError):  # raised by pickle, which deepcopy uses
        for module in model.modules():
            for key, value in vars(module).items():
                if key not in _STORES:
                    _share_uncopyable(value, memo)
        return copy.deepcopy(model, memo)


def _share_uncopyable(value: Any, memo: dict[int, Any]) -> None:
    """Add the smallest parts of an attribute that cannot be copied to the memo, so that the copy shares them."""
    if isinstance(value, Tensor | nn.Module) or id(value) in memo or _copies(value, memo):
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, tuple | list | set | frozenset):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        _share_uncopyable(part, memo)
    if not _copies(value, memo):
        memo[id(value)] = value


def _copies(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:  # a custom __reduce__ may raise anything
        return False
    return True


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model in place like `model.to(dtype)`, including tensors in plain attributes."""
    return change_attributes(model.to(dtype), lambda value: _cast(value, dtype))


def change_attributes(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Replace the tensors in plain attributes of all modules in place, and return the model."""
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, key, change(value))
    return model


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def view_in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy that shares the parameters and casts each to `dtype` when it is read.

    Everything else is copied, so a forward may change it. Only the parameters in use are in memory twice.
    """
    work = duplicate(model, {id(p): p for p in model.parameters()})
    change_attributes(work, lambda value: _cast(value, dtype))
    for module in work.modules():
        if isinstance(module, torch.jit.ScriptModule):  # its copy has its own parameters, which only TorchScript reads
            module.to(dtype)
            continue
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = _cast(buffer, dtype)
        casting = _CastParameters(module._parameters, dtype)
        if isinstance(module, nn.RNNBase):  # stores a separate list of its weights
            for key, p in casting.items():
                module._parameters[key] = p
            module._init_flat_weights()
        elif casting:
            module.__dict__["_parameters"] = casting
    return work


class _CastParameters(dict[str, Any]):
    """Dictionary of parameters that casts each one when it is read."""

    def __init__(self, parameters: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(parameters)
        self.dtype = dtype

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == self.dtype:
            return value
        return nn.Parameter(value.detach().to(self.dtype), value.requires_grad)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.keys() else default

    def items(self) -> ItemsView[str, Any]:
        return {key: self[key] for key in self}.items()

    def values(self) -> ValuesView[Any]:
        return {key: self[key] for key in self}.values()


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
