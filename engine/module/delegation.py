"""`Delegate`: a module that forwards all module methods and attributes to another network."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Self

from torch import nn

from ..errors import UnsupportedError

# The network's own dictionaries: parent modules, optimizers and `state_dict` find the same tensors, and hooks on
# `state_dict` act on both, whichever of the two they were registered on.
_SHARED = tuple(
    "_parameters _buffers _modules _non_persistent_buffers_set _state_dict_hooks _state_dict_pre_hooks "
    "_load_state_dict_pre_hooks _load_state_dict_post_hooks".split()
)

# Methods that act on the proxy itself: its call and its hooks.
_OWN = frozenset(
    "compile extra_repr forward get_extra_state modules named_modules register_backward_hook register_forward_hook "
    "register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook set_extra_state".split()
)
_PRIVATE = frozenset(
    "_apply _load_from_state_dict _register_load_state_dict_pre_hook _register_state_dict_hook "
    "_save_to_state_dict".split()
)
# Every other method of nn.Module: a network may have overridden it, or it changes the network.
_DELEGATED = frozenset(
    name
    for name, value in vars(nn.Module).items()
    if isinstance(value, FunctionType) and (name in _PRIVATE or not (name.startswith("_") or name in _OWN))
)

_DELEGATES_TO = "network's method"  # attribute of a delegating method: the network's function


class Delegate(nn.Module):
    """A proxy of a network, with its own forward.

    Methods of `nn.Module` are delegated to the network, including those that its class overrides. After `_seal`,
    attributes that the proxy does not have itself are set on the network and read from it.

    Args:
        network: the network; the proxy shares its parameters, buffers, children and state-dict hooks.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.__dict__["_network"] = network
        self._share()

    def _seal(self) -> None:
        """Set new attributes on the network from now on."""
        self.__dict__["_sealed"] = frozenset((*self.__dict__, "_sealed"))

    def _move_attributes(self) -> None:
        """Move attributes to the network that bypassed `__setattr__` (by `__dict__` or `object.__setattr__`)."""
        for name in [name for name in self.__dict__ if name not in self._sealed and not hasattr(type(self), name)]:
            self._network.__dict__[name] = self.__dict__.pop(name)

    def _share(self) -> None:
        self.__dict__.update((name, getattr(self._network, name)) for name in _SHARED)

    @property
    def training(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._network.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_network" in self.__dict__:  # ignore the assignment in nn.Module.__init__
            self._network.training = mode

    def __getattr__(self, name: str) -> Any:
        network = self.__dict__.get("_network")
        if network is None:  # during copying or unpickling
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        found = getattr(network, name)
        if isinstance(found, MethodType) and found.__self__ is network:
            return MethodType(_delegated(name, found.__func__), self)
        return found

    def _is_own(self, name: str) -> bool:
        if "_sealed" not in self.__dict__ or name in self.__dict__:
            return True
        return hasattr(type(self), name) and name not in _DELEGATED

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and isinstance(value, MethodType) and value.__self__ in (self, self._network):
            self.__dict__.pop("forward", None)
            if value.__func__ is not type(self).forward:  # another method of the network, also computed by tiles
                function = getattr(value.__func__, "__dict__", {}).get(_DELEGATES_TO, value.__func__)
                self._network.forward = MethodType(function, self._network)
        elif self._is_own(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._network, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name) and (name != "forward" or name in self.__dict__):
            object.__delattr__(self, name)
        else:
            delattr(self._network, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._network)})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _SHARED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        return twin

    def __prepare_scriptable__(self) -> Self:  # called by torch.jit.script
        raise UnsupportedError("an accelerated network cannot be scripted; script the network itself")

    def _replicate_for_data_parallel(self) -> Self:
        raise UnsupportedError(
            "an accelerated network cannot be replicated for nn.DataParallel; use DistributedDataParallel"
        )


def _delegated(name: str, of_network: Callable[..., Any]) -> Callable[..., Any]:
    """A method that calls the network's method; if that returns the network, it returns the proxy."""

    @functools.wraps(of_network)
    def method(self: Delegate, *args: Any, **kwargs: Any) -> Any:
        network = self._network
        result = getattr(network, name)(*args, **kwargs)
        return self if result is network else result

    vars(method)[_DELEGATES_TO] = of_network
    return method


for _name in _DELEGATED:
    setattr(Delegate, _name, _delegated(_name, getattr(nn.Module, _name)))


def is_container(network: nn.Module) -> bool:
    """Whether a network has a length and items, as `nn.Sequential` has."""
    try:
        len(network)  # pyright: ignore[reportArgumentType]
    except (TypeError, NotImplementedError):  # TorchScript modules have __len__ but may not implement it
        return False
    return hasattr(type(network), "__getitem__")


def has_extra_state(network: nn.Module) -> bool:
    """Whether a network stores extra state, in addition to tensors, in its `state_dict`."""
    return type(network).get_extra_state is not nn.Module.get_extra_state


class ExtraState:
    """Mixin with the methods of a network with extra state; PyTorch's DCP looks for them on the class."""

    _network: Any

    def get_extra_state(self) -> Any:
        return self._network.get_extra_state()

    def set_extra_state(self, state: Any) -> None:
        self._network.set_extra_state(state)


class Container:
    """Mixin with the methods of a container: length, items, iteration, membership, sums."""

    _network: Any

    def __iadd__(self, other: Any) -> Self:
        self._network += other
        return self

    def __imul__(self, other: Any) -> Self:
        self._network *= other
        return self


def _of_container(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: function(self._network, *args)


for _name, _function in {
    "__bool__": bool,
    "__len__": len,
    "__iter__": iter,
    "__contains__": operator.contains,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
    "__add__": operator.add,
    "__mul__": operator.mul,
    "__rmul__": operator.mul,
}.items():
    setattr(Container, _name, _of_container(_function))
