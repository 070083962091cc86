"""What stands before a forward by tiles: what cannot be computed is refused, threads take turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import GigamorphError, UnsupportedError
from . import locks


def entrance(method: Callable[..., Any]) -> Callable[..., Any]:
    """For methods of an accelerated network that compute, with images as first arguments.

    - Forward-mode differentiation, `torch.func` and parameters without values are refused.
    - A batch of no images, which has no tiles, goes through the network itself.
    - Threads take turns.
    - `torch.compile` leaves it as it is.
    """

    @functools.wraps(method)
    def entered(net: Any, *args: Any, **kwargs: Any) -> Any:
        return _uncompiled()(method, net, args, kwargs)

    return entered


_REASON = "an accelerated network computes by tiles, which cannot be traced; export the network itself"
_UNCOMPILED: list[Callable[..., Any]] = []  # of `_enter`, once it is made; a functools.cache would be compiled


def _uncompiled() -> Callable[..., Any]:
    if not _UNCOMPILED:  # it imports TorchDynamo, which takes a second
        _UNCOMPILED.append(torch.compiler.disable(_enter, reason=_REASON))
    return _UNCOMPILED[0]


def _enter(method: Callable[..., Any], net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    net.hand_over()
    if method.__name__ == "forward":
        _refuse_hooks_within_a_wrapper(net)
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
        with locks.turn(net):
            return method(net, *args, **kwargs)
    except RuntimeError as error:  # to look before would take longer than a small image
        _name_the_valueless(net, image, error)
        raise


_TRACED = (
    "an accelerated network computes by tiles, which cannot be traced (torch.jit.trace, torch.export, torch.fx, ONNX, "
    "fake tensors)"
)


def _refuse_tracing(given: Any) -> None:
    """Refuse to be traced: no tracer can look into the tiles. (TorchDynamo says so of `torch.func` and `make_fx`.)"""
    proxies = any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(given))
    if proxies or torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise UnsupportedError(f"{_TRACED}; give the network itself, whose parameters it shares")


def _refuse_tangents(tensors: Iterable[Tensor]) -> None:
    """Refuse dual tensors, whose tangents do not go through tiles."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise UnsupportedError(
            "forward-mode differentiation (dual tensors) does not go through tiles; take first gradients "
            "(backward, torch.autograd.grad), or do this with the network itself"
        )


def _refuse_hooks_within_a_wrapper(net: Any) -> None:
    """A `forward` set on the accelerated network runs around the network's call, and so around hooks on the network."""
    network = net._network
    if "forward" in net.__dict__ and (network._forward_pre_hooks or network._forward_hooks):
        raise GigamorphError(
            "the forward of the accelerated network was replaced, and hooks on the network would run within it instead "
            "of around it; register the hooks on what accelerate() returned, or replace model.forward before accelerate"
        )


def _refuse_attributes(tensor: Tensor) -> None:
    """Refuse a tensor that carries further values as attributes (`x.scale = 2`), which a recording does not see."""
    own = [name for name in vars(tensor) if not name.startswith("_")]
    if own:
        raise GigamorphError(
            f"a tensor among the arguments has an attribute '{own[0]}' of its own, which the tiles have not; give "
            "that as an argument, and x.detach() or another view in the tensor's place"
        )


def _refuse_kind(tensor: Tensor) -> None:
    """Refuse a tensor of a class whose ops give that class again (MONAI's MetaTensor); recordings see plain tensors."""
    if type(tensor) in (Tensor, Parameter):
        return
    kind = type(tensor.detach().reshape(-1)[:0] * 1)
    if kind.__module__.startswith("torch._subclasses"):
        raise UnsupportedError(f"{_TRACED}; give the network itself, whose parameters it shares")
    if kind is not Tensor:
        raise GigamorphError(
            f"a tensor among the arguments is a {type(tensor).__name__}, and stock PyTorch's result would be a "
            f"{kind.__name__}, which tiles are not; give x.as_subclass(torch.Tensor) in its place"
        )


def _name_the_valueless(net: Any, image: Tensor | None, error: RuntimeError) -> None:
    """Say of an error that comes of tensors without values which they are."""
    for name, tensor in chain(net.named_parameters(), net.named_buffers()):
        if tensor.is_meta:
            raise GigamorphError(
                f"'{name}' is on the meta device and has no values; call to_empty(device=...) and load weights first"
            ) from error
    if image is not None and image.is_meta:
        raise GigamorphError("the image is on the meta device and has no values; plan(net, size) needs none") from error


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
