"""Copies of a network: deep ones, and views that share its parameters and give them in another dtype when asked."""

from __future__ import annotations

import copy
from collections.abc import ItemsView, Mapping, ValuesView
from typing import Any

import torch
from torch import Tensor, nn

_STORES = ("_parameters", "_buffers", "_modules")


def duplicate(model: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy; what a hook has computed (the old `nn.utils.weight_norm`) is copied too, without its graph.

    What cannot be copied (a lock, an open file, a compiled function) is shared with the network.

    Args:
        model: any network.
        shared: id of a tensor -> what the copy has in its place.
    """
    memo: dict[int, Any] = dict(shared or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(model, dict(memo))
    except (TypeError, NotImplementedError, AttributeError):  # what pickle, and so deepcopy, refuses
        for module in model.modules():
            for key, value in vars(module).items():
                if key not in _STORES:
                    _share_uncopyable(value, memo)
        return copy.deepcopy(model, memo)


def _share_uncopyable(value: Any, memo: dict[int, Any]) -> None:
    """Add to the memo what in an attribute cannot be copied, as itself: the least part of it that cannot."""
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
    except Exception:  # its own __reduce__ may raise anything
        return False
    return True


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)` that also casts tensors held as plain attributes; in place."""
    model.to(dtype)
    for module in model.modules():
        _cast_attributes(module, dtype)
    return model


def seen_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that shares the parameters and gives them in that dtype, each as a tensor of its own when it is read.

    Everything else is copied, so that a forward may change it. No more than the parameters in use are in memory twice.
    """
    work = duplicate(model, {id(p): p for p in model.parameters()})
    for module in work.modules():
        if isinstance(module, torch.jit.ScriptModule):  # its copy has parameters of its own, which only it can read
            module.to(dtype)
            continue
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.to(dtype)
        _cast_attributes(module, dtype)
        seen = _Seen(module._parameters, dtype)
        if isinstance(module, nn.RNNBase):  # keeps a list of its own
            for key, p in seen.items():
                module._parameters[key] = p
            module._init_flat_weights()
        elif seen:
            module.__dict__["_parameters"] = seen
    return work


def _cast_attributes(module: nn.Module, dtype: torch.dtype) -> None:
    for key, value in vars(module).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(module, key, value.to(dtype))


class _Seen(dict[str, Any]):
    """Parameters that are cast when they are read."""

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
