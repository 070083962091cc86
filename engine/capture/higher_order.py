"""Higher-order operators of Dynamo's graphs, and replacements for calls that are opaque to a recorder.

Checkpointed layers are inlined, because the tiles are recomputed in the backward anyway. Custom autograd Functions and
tensor hooks come as graphs of their forward and backward, which the lowering reads (`lowering.ops.custom`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import UnsupportedError
from ..torch_private import BEFORE_2_13, memory_of
from .replacements import RECURRENT


@dataclass(frozen=True, eq=False)
class CustomFunction:
    """A custom `autograd.Function` as two graphs.

    Attributes:
        forward: graph from the arguments to (outputs, values saved for the backward).
        backward: graph from the gradients of the outputs and the saved values to the gradients of the arguments.
        no_gradient: indices of outputs that have no gradient.
        dirty: indices of outputs that are arguments written to in place.
        intermediates: the number of last outputs that PyTorch 2.11 adds; no call reads them, the backward ignores them.
    """

    forward: Any
    backward: Any
    no_gradient: tuple[int, ...] = ()
    dirty: tuple[int, ...] = ()
    intermediates: int = 0

    name = "autograd.Function"
    __name__ = "autograd.Function"

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        tensors = tuple(a for a in args if isinstance(a, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(self, tensors, *args)
        return _Applied.apply(self, *args)  # pyright: ignore[reportReturnType]


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: CustomFunction, *args: Any) -> tuple[Any, ...]:
        versions = {memory_of(a): a._version for a in args if isinstance(a, Tensor) and not a.is_inference()}
        outputs, saved = function.forward.run(args)
        outputs = outputs[: len(outputs) - function.intermediates]
        made = {memory_of(t): t._version for t in outputs if isinstance(t, Tensor) and not t.is_inference()}
        if BEFORE_2_13 and any(versions.get(memory, version) != version for memory, version in made.items()):
            raise UnsupportedError(
                "a custom autograd function returns an input that it has written to (mark_dirty), which PyTorch "
                f"{torch.__version__} does not record; clone it first, or use PyTorch 2.13"
            )
        ctx.function, ctx.tensor_flags = function, [isinstance(value, Tensor) for value in saved]
        ctx.others = [value for value in saved if not isinstance(value, Tensor)]
        ctx.save_for_backward(*(value for value in saved if isinstance(value, Tensor)))
        ctx.mark_non_differentiable(*(outputs[n] for n in function.no_gradient if n < len(outputs)))
        ctx.mark_dirty(*(outputs[n] for n in function.dirty))
        ctx.set_materialize_grads(False)
        ctx.shapes = [(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else None for t in outputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):  # stock's backward would not run
            return (None,) * len(ctx.needs_input_grad)
        grads = tuple(
            torch.zeros(like[0], dtype=like[1], device=like[2]) if grad is None and like is not None else grad
            for grad, like in zip(grads, ctx.shapes, strict=True)
        )
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        saved = [next(tensors if is_tensor else others) for is_tensor in ctx.tensor_flags]
        return None, *ctx.function.backward.run([*grads, *[None] * ctx.function.intermediates, *saved])


@dataclass(frozen=True, eq=False)
class TensorHook:
    """A hook of `Tensor.register_hook` as a graph.

    Attributes:
        body: graph from the gradient to its replacement, or None.
    """

    body: Any

    __name__ = "tensor_hook"

    def __call__(self, x: Tensor, *held: Any) -> Tensor:
        if has_torch_function((x,)):
            return handle_torch_function(self, (x,), x, *held)
        return _Hooked.apply(self, x, *held)  # pyright: ignore[reportReturnType]


class _Hooked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hook: TensorHook, x: Tensor, *held: Any) -> Tensor:
        ctx.hook, ctx.held = hook, held
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        if grad is not None:
            found = ctx.hook.body.run([grad, *ctx.held])
            found = found[0] if isinstance(found, (tuple, list)) else found
            grad = grad if found is None else found
        return None, grad, *(None for _ in ctx.held)


def checkpointed(body: Any, *args: Any, **_options: Any) -> Any:
    """Run a checkpointed part inline: tiles are recomputed in the backward anyway."""
    tensors = tuple(a for a in args if isinstance(a, Tensor))
    if has_torch_function(tensors):
        return handle_torch_function(checkpointed, tensors, body, *args)
    return body.run(args)


def _custom(forward: Any, backward: Any, *args: Any, **options: Any) -> Any:
    indices = tuple(options.get("non_differentiable_idx", ())), tuple(options.get("dirty_idx", ()))
    return CustomFunction(forward, backward, *indices, options["intermediates"])(*args)


def _hooked(x: Tensor, body: Any, *held: Any) -> Tensor:
    return TensorHook(body)(x, *held)


def _data(tensor: Tensor) -> Tensor:
    return tensor.data


def _assign(tensor: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`tensor.data = value`, in Dynamo's form."""
    if rest:
        return tensor.set_(value, *rest)  # pyright: ignore[reportCallIssue, reportArgumentType]
    tensor.data = value
    return tensor


def of_arrays(operator: Any) -> Callable[..., Any]:
    """An operator of NumPy arrays in Dynamo's form; PyTorch 2.15 hides its calls from function modes."""

    array: Any = importlib.import_module("torch._numpy").ndarray

    def call(*args: Any) -> Any:
        result = operator.op(*(array(a) if isinstance(a, Tensor) else a for a in args))
        return getattr(result, "tensor", result)

    return call


def _made_by_class(*args: Any, size: Any = None) -> Tensor:
    """`torch.Tensor(...)`; its own legacy constructor does not support fake tensors."""
    args = args if size is None else (*args, torch.Size(size))
    if len(args) == 1 and isinstance(args[0], list | tuple) and not isinstance(args[0], torch.Size):
        return torch.tensor(args[0], dtype=torch.get_default_dtype())
    sizes = args[0] if len(args) == 1 and isinstance(args[0], torch.Size) else args or (0,)
    if all(isinstance(size, int) for size in sizes):
        return torch.empty(sizes)
    return torch.Tensor(*args)


CALLED: dict[str, Callable[..., Any]] = {
    "tag_activation_checkpoint": checkpointed,
    "wrap_activation_checkpoint": checkpointed,
    "invoke_subgraph": lambda body, _name, *args: body.run(args),
    "autograd_function_apply": _custom,
    "register_hook": _hooked,
    "_get_data_attr": _data,
    "set_": _assign,
    "shallow_copy_data_": _assign,  # this and the next four from PyTorch 2.14 on
    "mT": lambda tensor: tensor.mT,
    "mH": lambda tensor: tensor.mH,
    "numpy_T": lambda tensor: tensor.T,
    "matrix_H": lambda tensor: tensor.H,
    "Tensor": _made_by_class,
    "new_full": Tensor.new_full,
    "_lower_version_count_by_1": lambda tensor: tensor,
    **{name: getattr(torch, name) for name in RECURRENT},
}
"""Name of a function that Dynamo's graph calls -> function to call instead."""

CALLED_WITH_NONE = (_Applied, _Hooked)
"""Functions whose backward does nothing without a gradient, where stock's backward would not run."""
