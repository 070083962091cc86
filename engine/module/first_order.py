"""First-order restriction of the backward by tiles: other forms of differentiation raise an error."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ChangedError, UnsupportedError
from ..torch_private import inside_checkpoint
from . import locks

Memory = list[tuple[nn.Parameter, torch.UntypedStorage]]
_REMEDY = "use first gradients (backward, torch.autograd.grad), or the network itself"


def refuse_checkpoint() -> None:
    """Refuse a forward that changes state inside `torch.utils.checkpoint`, whose recomputation stops early.

    Stock PyTorch changes running statistics again in the recomputation. By tiles they are written at its end, which is
    never reached.
    """
    if inside_checkpoint():
        raise UnsupportedError(
            "torch.utils.checkpoint cannot wrap an accelerated network that changes its state (running statistics), "
            "because the backward would change it again; remove the checkpoint, the memory budget replaces it"
        )


class _Ends(torch.autograd.Function):
    """Returns gradients unchanged; a second derivative through their inputs raises an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.detach() for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor):
        raise UnsupportedError(
            f"second derivatives (create_graph=True, gradient penalties) are not supported by tiles; {_REMEDY}"
        )


def note_memory(ctx: Any, tensors: Iterable[Tensor]) -> None:
    """Record the storages of saved parameters: `p.data = other` does not change their version counters."""
    ctx.memory = memory_of_parameters(t for t in tensors if isinstance(t, nn.Parameter))


def memory_of_parameters(parameters: Iterable[nn.Parameter]) -> Memory:
    """The parameters and their storages, for `refuse_moved`."""
    return [(parameter, parameter.untyped_storage()) for parameter in parameters]


def refuse_moved(memory: Memory) -> None:
    """Raise an error if a parameter has another storage than before.

    Raises:
        ChangedError: with the shape of the parameter.
    """
    for parameter, storage in memory:
        if parameter.untyped_storage() is not storage:
            raise ChangedError(
                f"the data of a parameter of shape {list(parameter.shape)} was replaced (p.data = ...) after the "
                "forward, but the backward needs it again; set it before the forward, or after the backward"
            )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of the backward of a function by tiles, which locks the network and refuses second derivatives.

    `ctx.turn` is the lock of the forward (`locks.current()`); `note_memory` sets `ctx.memory`.
    """
    ended = ends_here(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_moved(ctx.memory)
        with _describe_changed_tensors(), locks.reacquire(ctx.turn):
            return ended(ctx, *grads)

    return run


def ends_here(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a function's backward, whose own derivative raises an error.

    `torch.autograd.function.once_differentiable` would not raise an error if no incoming gradient requires a gradient,
    and would lose the dependence of the gradient on the weights.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if any(_is_batched(grad) for grad in grads if grad is not None):
            raise UnsupportedError(
                "batched gradients (is_grads_batched, vectorize=True) are not supported by tiles; "
                "use one backward per gradient"
            )
        came_from = [t for t in (*grads, *ctx.saved_tensors) if t is not None] if torch.is_grad_enabled() else None
        with torch.no_grad():
            results = backward(ctx, *grads)
        if came_from is None:  # the usual case, without create_graph
            return results
        tensors = [t for t in results if isinstance(t, Tensor)]
        ended = iter(_Ends.apply(len(tensors), *tensors, *came_from) if tensors else ())  # pyright: ignore
        return tuple(next(ended) if isinstance(t, Tensor) else t for t in results)

    return run


@contextlib.contextmanager
def _describe_changed_tensors() -> Iterator[None]:
    """Turn PyTorch's error about tensors changed in place into a `ChangedError` that describes the tensor."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        shape = re.search(r"\[torch\.\w+ (\[[\d, ]*\])\]", str(error))
        what = f"a tensor of shape {shape[1]}" if shape else "a tensor"
        raise ChangedError(
            f"{what} has been modified by an inplace operation after the forward, but the backward needs it again; "
            "change images, weights and buffers after the backward, or pass a copy"
        ) from error


def _is_batched(tensor: Tensor) -> bool:
    """Whether a tensor is a batch of gradients of `torch.vmap`, which has no storage."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return True
    return False
