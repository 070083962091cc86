"""Backward hooks of modules (`register_full_backward_hook`, `register_full_backward_pre_hook`).

PyTorch puts a function that changes nothing around a module's input and output, and hangs the hooks on the two nodes.
Both calls are recorded; on the maps as they are then, whole, each does what PyTorch's own `BackwardHook` does, so hooks
are given whole gradients, and what they return goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

_ENTERED = "gigamorph: the module's hook"  # in the metadata of the node behind its input


@dataclass(frozen=True)
class Enter:
    """What goes into a module.

    Attributes:
        hooks, pre_hooks: of the module, as its call takes them together.
        count: of its arguments.
        places: of those that are tensors.
    """

    module: nn.Module
    hooks: tuple[Callable[..., Any], ...]
    pre_hooks: tuple[Callable[..., Any], ...]
    count: int
    places: tuple[int, ...]

    __name__ = "module_hook"

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        hook = BackwardHook(self.module, _reached(self.hooks), _reached(self.pre_hooks))
        made = _part(hook.setup_input_hook(_whole(self.count, self.places, tensors)), self.places)
        node = _node(made)
        if node is not None:
            node.metadata[_ENTERED] = hook
            if len(self.places) == 1:
                # Autograd visits it also where the stage that reads the map has no gradient for it; stock would not.
                node.set_materialize_grads(False)
        return made


@dataclass(frozen=True)
class Leave:
    """What comes out of a module; the first tensor is what went into it, if gradients flow through that."""

    module: nn.Module
    hooks: tuple[Callable[..., Any], ...]
    pre_hooks: tuple[Callable[..., Any], ...]
    entered: int | None  # how many arguments the module had, where no gradient flows through them
    count: int
    places: tuple[int, ...]

    __name__ = "module_hook"

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        hook = BackwardHook(self.module, _reached(self.hooks), _reached(self.pre_hooks))
        if self.entered is None:
            node, tensors = _node(tensors[:1]), tensors[1:]
            hook = hook if node is None else node.metadata[_ENTERED]
        else:
            hook.n_inputs = self.entered
        return _part(hook.setup_output_hook(_whole(self.count, self.places, tensors)), self.places)


class RecordedHook:
    """Stands for PyTorch's `BackwardHook` while a forward is recorded."""

    def __init__(
        self,
        record: Callable[[Callable[..., Any], Sequence[Tensor]], tuple[Tensor, ...]],
        module: nn.Module,
        hooks: Sequence[Callable[..., Any]],
        pre_hooks: Sequence[Callable[..., Any]],
    ):
        self.record, self.given = record, (module, tuple(hooks), tuple(pre_hooks))
        self.count, self.first = 0, list[Tensor]()

    def setup_input_hook(self, args: Any) -> Any:
        self.count = len(args)
        places, tensors = _watched(args)
        if not tensors:
            return args
        made = self.record(Enter(*self.given, len(args), places), tensors)
        self.first = [t for t in made if t.requires_grad][:1]
        return _refilled(args, places, made)

    def setup_output_hook(self, args: Any) -> Any:
        results = args if isinstance(args, tuple) else (args,)
        places, tensors = _watched(results)
        if not tensors:
            return args
        leave = Leave(*self.given, None if self.first else self.count, len(results), places)
        results = _refilled(results, places, self.record(leave, [*self.first, *tensors]))
        return results if isinstance(args, tuple) else results[0]


def _watched(args: Sequence[Any]) -> tuple[tuple[int, ...], list[Tensor]]:
    """Places and tensors of arguments, if a gradient flows through any."""
    places = tuple(n for n, arg in enumerate(args) if isinstance(arg, Tensor))
    tensors = [args[n] for n in places]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return (), []
    return places, tensors


def _whole(count: int, places: Sequence[int], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    found = dict(zip(places, tensors, strict=True))
    return tuple(found.get(n) for n in range(count))


def _part(args: Sequence[Any], places: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(args[n] for n in places)


def _refilled(args: Any, places: Sequence[int], tensors: Sequence[Tensor]) -> Any:
    filled = list(args)
    for place, tensor in zip(places, tensors, strict=True):
        filled[place] = tensor
    return tuple(filled) if type(args) is tuple else type(args)(*filled)


def _reached(hooks: Sequence[Callable[..., Any]]) -> list[Callable[..., Any]]:
    """The hooks, which are not called where no gradient comes: stock's backward would not be there.

    Autograd visits all that a stage reads, also where the stage has no gradient for it.
    """

    def called(hook: Callable[..., Any], module: nn.Module, *grads: Sequence[Tensor | None]) -> Any:
        return None if all(grad is None for grad in grads[-1]) else hook(module, *grads)

    return [partial(called, hook) for hook in hooks]


def _node(tensors: Sequence[Tensor]) -> Any:
    return next((t.grad_fn for t in tensors if t.grad_fn is not None), None)
