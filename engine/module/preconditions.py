"""Preconditions of a computation by tiles: checks of its inputs, and the lock of the network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..errors import GigamorphError, UnsupportedError
from ..torch_private import tree_leaves, tree_map
from . import locks


def with_preconditions(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of methods that compute by tiles, with an accelerated network as first argument and images after it.

    - Forward-mode differentiation, `torch.func` and parameters without values raise an error.
    - The network itself computes an empty batch, which has no tiles.
    - The network is locked, so other threads wait.
    - `torch.compile` does not trace into the method.
    """

    @functools.wraps(method)
    def wrapper(net: Any, *args: Any, **kwargs: Any) -> Any:
        return _uncompiled()(method, net, args, kwargs)

    return wrapper


_REASON = "an accelerated network computes by tiles, which cannot be traced; export the network itself"
_UNCOMPILED: list[
    Callable[..., Any]
] = []  # caches the wrapped `_check_and_run`; Dynamo would compile a functools.cache


def _uncompiled() -> Callable[..., Any]:
    if not _UNCOMPILED:  # the call imports TorchDynamo, which takes a second
        _UNCOMPILED.append(torch.compiler.disable(_check_and_run, reason=_REASON))
    return _UNCOMPILED[0]


def _check_and_run(method: Callable[..., Any], net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    net._move_attributes()
    if method.__name__ == "forward":
        _refuse_hooks_inside_wrapper(net)
    given = list(_tensors((args, kwargs)))
    _refuse_tracing((args, kwargs))
    _refuse_tangents(chain(given, net.parameters()))
    for tensor in given:
        _refuse_kind(tensor)
        _refuse_attributes(tensor)
    image = given[0] if given else None
    if image is not None and not image.numel() and method.__name__ == "forward":
        device = net._device()
        return net._network(*tree_map(lambda a: a.to(device) if isinstance(a, Tensor) else a, args), **kwargs)
    try:
        with locks.exclusive(net):
            return method(net, *args, **kwargs)
    except RuntimeError as error:  # a check in advance would take longer than a small image
        _explain_meta_tensors(net, image, error)
        raise


_TRACED = (
    "an accelerated network computes by tiles, which cannot be traced (torch.jit.trace, torch.export, torch.fx, ONNX, "
    "fake tensors)"
)


def _refuse_tracing(given: Any) -> None:
    """Refuse tracers, which cannot see tiles. (TorchDynamo itself refuses `torch.func` and `make_fx`.)"""
    proxies = any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(given))
    if proxies or torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise UnsupportedError(f"{_TRACED}; trace the network itself, which shares its parameters")


def _refuse_tangents(tensors: Iterable[Tensor]) -> None:
    """Refuse dual tensors of forward-mode differentiation."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise UnsupportedError(
            "forward-mode differentiation (dual tensors) is not supported by tiles; use first gradients "
            "(backward, torch.autograd.grad), or the network itself"
        )


def _refuse_hooks_inside_wrapper(net: Any) -> None:
    """Refuse hooks on a network if the forward of its accelerated form was replaced: the hooks would run inside it."""
    network = net._network
    if "forward" in net.__dict__ and (network._forward_pre_hooks or network._forward_hooks):
        raise GigamorphError(
            "the forward of the accelerated network was replaced, so hooks on the network would run inside it instead "
            "of around it; register them on the accelerated network, or replace model.forward before accelerate()"
        )


def _refuse_attributes(tensor: Tensor) -> None:
    """Refuse a tensor with attributes (`x.scale = 2`), which a recording would miss."""
    own = [name for name in vars(tensor) if not name.startswith("_")]
    if own:
        raise GigamorphError(
            f"a tensor argument has the attribute '{own[0]}', which its tiles cannot have; pass the attribute as an "
            "argument, and x.detach() or another view instead of the tensor"
        )


def _refuse_kind(tensor: Tensor) -> None:
    """Refuse tensor subclasses whose ops return the subclass (MONAI's MetaTensor); recordings see plain tensors."""
    if type(tensor) in (Tensor, Parameter):
        return
    kind = type(tensor.detach().reshape(-1)[:0] * 1)
    if kind.__module__.startswith("torch._subclasses"):
        raise UnsupportedError(f"{_TRACED}; trace the network itself, which shares its parameters")
    if kind is not Tensor:
        raise GigamorphError(
            f"a tensor argument is a {type(tensor).__name__}; stock PyTorch would return a {kind.__name__}, but tiles "
            "are plain tensors; pass x.as_subclass(torch.Tensor)"
        )


def _explain_meta_tensors(net: Any, image: Tensor | None, error: RuntimeError) -> None:
    """Raise an error that names the tensor without values, if there is one."""
    for name, tensor in chain(net.named_parameters(), net.named_buffers()):
        if tensor.is_meta:
            raise GigamorphError(
                f"'{name}' is on the meta device and has no values; call to_empty(device=...) and load weights first"
            ) from error
    if image is not None and image.is_meta:
        raise GigamorphError("the image is on the meta device and has no values; plan(net, size) needs none") from error


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
