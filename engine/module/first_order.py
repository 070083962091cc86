"""The backward by tiles gives first derivatives; what would differentiate it in another way is refused by name."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ChangedError, UnsupportedError
from . import locks

_REMEDY = "take first gradients (backward, torch.autograd.grad), or do this with the network itself"


def refuse_checkpoint() -> None:
    """Refuse a forward that changes state within `torch.utils.checkpoint` of the kind that stops early the second time.

    Stock PyTorch changes running statistics again then; by tiles they are written at the end, which is not reached.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook."):
        raise UnsupportedError(
            "torch.utils.checkpoint around an accelerated network that changes its state (running statistics), which "
            "stock PyTorch changes again in the backward; leave checkpointing out, the memory budget does its work"
        )


class _Ends(torch.autograd.Function):
    """Gradients as they are; to differentiate them once more, by whatever they came from, is refused."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.detach() for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor):
        raise UnsupportedError(
            f"second derivatives (create_graph=True, gradient penalties) do not go through tiles; {_REMEDY}"
        )


def note_memory(ctx: Any, tensors: Iterable[Tensor]) -> None:
    """Note where the parameters lie that a function saves: `p.data = other` leaves their versions as they are."""
    ctx.memory = [(t, t.untyped_storage()) for t in tensors if isinstance(t, nn.Parameter)]


def _refuse_moved(memory: Iterable[tuple[nn.Parameter, torch.UntypedStorage]]) -> None:
    for parameter, storage in memory:
        if parameter.untyped_storage() is not storage:
            raise ChangedError(
                f"a parameter of shape {list(parameter.shape)} got other data (p.data = ...) after the forward, and "
                "the backward computes tiles with it again; set it before the forward, or after the backward"
            )


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a function by tiles: it takes its turn, and cannot be differentiated in turn.

    `torch.autograd.function.once_differentiable` would let it be where no incoming gradient wants a gradient, and thus
    lose what the gradient owes to the weights. `ctx.turn` is the turn of the forward (`locks.current()`), `ctx.memory`
    by `note_memory`.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if any(_is_batched(grad) for grad in grads if grad is not None):
            raise UnsupportedError(
                "batched gradients (is_grads_batched, vectorize=True) do not go through tiles; "
                "take one gradient after the other"
            )
        _refuse_moved(ctx.memory)
        with _named(), locks.again(ctx.turn):
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
def _named() -> Iterator[None]:
    """Name what PyTorch says of tensors that were changed, also of those that stock would not read a second time."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        shape = re.search(r"\[torch\.\w+ (\[[\d, ]*\])\]", str(error))
        what = f"a tensor of shape {shape[1]}" if shape else "a tensor"
        raise ChangedError(
            f"{what} has been modified by an inplace operation after the forward, and the backward computes tiles with "
            "it again; change images, weights and buffers after the backward, or give a copy"
        ) from error


def _is_batched(tensor: Tensor) -> bool:
    """Whether a gradient is several in one, as `torch.vmap` hands them on; such a tensor has no memory to look at."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return True
    return False
