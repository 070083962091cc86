"""Tensors that share memory, in a recording where every write makes a new value.

A view is identified by the calls that made it from its *root*, the first tensor on its memory. A write to a view
becomes a write to the root, by the inverse of those calls. Other views of the memory are made again from the root when
they are read. So

    y = x[:, :2]; y.mul_(3); z = x + 1          becomes        y' = x[:, :2] * 3;  x' = x with [:, :2] = y';  z = x' + 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..torch_private import memory_of


@dataclass(slots=True)
class ViewCall:
    """A call that made a view of `parent`: `func(*args, **kwargs)[index]`."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parent: Tensor
    outputs: tuple[Tensor, ...]
    index: int


@dataclass(slots=True)
class Memory:
    """The memory of a root and its views; `version` counts the writes."""

    root: Tensor
    version: int = 0


@dataclass(slots=True)
class Alias:
    """A tensor, the steps from its root to it, and the write up to which its value is current."""

    tensor: Tensor
    memory: Memory
    chain: tuple[ViewCall, ...] = ()
    version: int = 0

    @property
    def untracked(self) -> bool:
        """Whether `.data` made it, so that autograd does not notice writes to it."""
        return any(step.name == "data" for step in self.chain)

    @property
    def cut(self) -> bool:
        """Whether writes to it do not join the root's graph, as after `x.data.add_(y)`."""
        return any(step.name in ("data", "detach") for step in self.chain)


@dataclass
class Aliases:
    """All tensors of a recording, by identity."""

    of: dict[int, Alias] = field(default_factory=dict)
    memories: dict[int, Memory] = field(default_factory=dict)

    def add(self, tensor: Tensor, step: ViewCall | None) -> None:
        """Add a new tensor; `step` made it, if it is a view."""
        key = memory_of(tensor)
        memory = self.memories.get(key)
        if memory is None or step is None or id(step.parent) not in self.of:
            self.memories[key] = memory = Memory(tensor)
            self.of[id(tensor)] = Alias(tensor, memory)
            return
        chain = (*self.of[id(step.parent)].chain, step)
        self.of[id(tensor)] = Alias(tensor, memory, chain, memory.version)

    def parent(self, tensor: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """The input whose memory an output shares."""
        key = memory_of(tensor)
        if key not in self.memories:
            return None
        return next((t for t in inputs if memory_of(t) == key), None)

    def twin(self, tensor: Tensor) -> Tensor | None:
        """A known tensor with the same memory and layout."""
        memory = self.memories.get(memory_of(tensor))
        form = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
        for alias in self.of.values() if memory is not None else ():
            t = alias.tensor
            if alias.memory is memory and (t.shape, t.stride(), t.storage_offset(), t.dtype) == form:
                return t
        return None


_SAME = frozenset({"detach", "data", "alias", "contiguous", "to"})
_RESHAPES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as", "reshape_as"}
)
_SWAPS = frozenset({"transpose", "swapaxes", "swapdims", "t", "mT", "T"})
_PIECES = frozenset(
    {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "select", "narrow", "unsafe_chunk"}
)


def inverse(step: ViewCall, where: str) -> tuple[Callable[..., Any], str, Callable[[Any, Any], tuple[Any, ...]]]:
    """The call that replaces the view's part of the parent by a new value: function, name, and its arguments.

    Raises:
        UnsupportedError: the view has no inverse call.
    """
    name, parent, child = step.name, step.parent, step.outputs[step.index]
    if name == "__getitem__":
        index = step.args[1]
        return Tensor.__setitem__, "__setitem__", lambda p, c: (p, index, c)
    if name in _RESHAPES and child.numel() == parent.numel():
        return torch.reshape, "reshape", lambda _p, c: (c, tuple(parent.shape))
    if name in _SWAPS and child.dim() == parent.dim() == 2:
        return torch.transpose, "transpose", lambda _p, c: (c, 0, 1)
    if name in _SWAPS and len(step.args) == 3:
        return torch.transpose, "transpose", lambda _p, c: (c, *step.args[1:])
    if name == "permute" and not step.kwargs:
        dims = step.args[1] if len(step.args) == 2 and not isinstance(step.args[1], int) else step.args[1:]
        dims = [d % parent.dim() for d in dims]
        return torch.permute, "permute", lambda _p, c: (c, tuple(dims.index(d) for d in range(len(dims))))
    if name == "diagonal" and not step.kwargs:
        return torch.diagonal_scatter, "diagonal_scatter", lambda p, c: (p, c, *step.args[1:])
    if name in _PIECES:
        index = _piece(step)
        return Tensor.__setitem__, "__setitem__", lambda p, c: (p, index, c)
    raise UnsupportedError(
        f"{where} changes the result of '{step.name}' in place while another view of its memory is read; use an "
        "out-of-place op"
    )


def is_same(step: ViewCall) -> bool:
    """Whether a view is its whole parent, in the same shape."""
    child = step.outputs[step.index]
    return step.name in _SAME and child.shape == step.parent.shape


def _piece(step: ViewCall) -> tuple[Any, ...]:
    """The index of a view that is a piece of its parent along one dimension."""
    parent, child = step.parent, step.outputs[step.index]
    names = {"unbind": 1, "select": 1, "narrow": 1}
    position = names.get(step.name, 2)
    dim = step.kwargs.get("dim", step.args[position] if len(step.args) > position else 0) % parent.dim()
    if child.dim() < parent.dim() or step.name in ("narrow", "select"):
        start = (child.storage_offset() - parent.storage_offset()) // max(parent.stride(dim), 1)
    else:
        start = sum(t.shape[dim] for t in step.outputs[: step.index])
    along = start if child.dim() < parent.dim() else slice(start, start + child.shape[dim])
    return (*[slice(None)] * dim, along)
