"""Layers, parameters, buffers and hooks that change: in the forward, or by the user between two calls."""

from __future__ import annotations

import contextlib
import copy
import random
import types
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import register_parametrization

from ..piece import conv
from .base import VALUES, Edited, Foreign
from .harness import watch


def _network(net: nn.Module) -> nn.Module:
    """The plain network below what the user calls."""
    return net.__dict__.get("_network", net)


class DirectAttributes(Edited):
    """Attributes that are set past `nn.Module.__setattr__`: on the network, a child, a layer, what the user calls."""

    def called_dictionary(self, net: nn.Module, number: int) -> None:
        net.__dict__["skips"] = ((0, 1, 2), ())[number - 1]

    def called_object_setattr(self, net: nn.Module, number: int) -> None:
        object.__setattr__(net, "skips", ((0, 1, 2), ())[number - 1])

    def called_attribute(self, net: nn.Module, number: int) -> None:
        net.skips = ((0, 1, 2), ())[number - 1]

    def called_vars(self, net: nn.Module, number: int) -> None:
        vars(net).update(container=("list", "dict")[number - 1])

    def network_dictionary(self, net: nn.Module, number: int) -> None:
        _network(net).__dict__["skips"] = ((0, 1, 2), ())[number - 1]

    def network_object_setattr(self, net: nn.Module, number: int) -> None:
        object.__setattr__(_network(net), "container", ("list", "dict")[number - 1])

    def network_vars(self, net: nn.Module, number: int) -> None:
        vars(_network(net)).update(skips=((0, 1, 2), ())[number - 1])

    def child_dictionary(self, net: nn.Module, number: int) -> None:
        self.__dict__["factor"] = VALUES[number]

    def child_object_setattr(self, net: nn.Module, number: int) -> None:
        object.__setattr__(self, "factor", VALUES[number])

    def child_as_integer(self, net: nn.Module, number: int) -> None:
        self.factor = number + 1

    def child_as_tensor(self, net: nn.Module, number: int) -> None:
        self.factor = torch.tensor(VALUES[number], dtype=torch.float64)

    def layer_dictionary(self, net: nn.Module, number: int) -> None:
        self.conv.__dict__["stride"] = ((2, 2), (1, 1))[number - 1]

    def layer_padding(self, net: nn.Module, number: int) -> None:
        object.__setattr__(self.conv, "padding", ((0, 0), (2, 2))[number - 1])

    def layer_bias(self, net: nn.Module, number: int) -> None:
        self.conv._parameters["bias"] = (
            None if number == 1 else nn.Parameter(torch.ones(self.conv.out_channels).double())
        )

    def layer_shadowed(self, net: nn.Module, number: int) -> None:
        """An entry of the instance's dictionary does hide a parameter."""
        if number == 1:
            self.conv.__dict__["bias"] = torch.full((self.conv.out_channels,), 0.5, dtype=torch.float64)
        else:
            self.conv.__dict__.pop("bias", None)

    def children_dictionary(self, net: nn.Module, number: int) -> None:
        self._modules["conv"] = conv(self.conv.in_channels).double()


class WeightsBetween(Edited):
    """Parameters that the user replaces or changes between two calls."""

    def new_parameter(self, net: nn.Module, number: int) -> None:
        self.conv.weight = nn.Parameter(self.conv.weight.detach() * 0.5)

    def data(self, net: nn.Module, number: int) -> None:
        self.conv.weight.data = self.conv.weight.data.flip(0)

    def in_place(self, net: nn.Module, number: int) -> None:
        with torch.no_grad():
            self.conv.weight.mul_(0.5)

    def state_assigned(self, net: nn.Module, number: int) -> None:
        state = {name: value * 0.9 for name, value in net.state_dict().items()}
        net.load_state_dict(state, assign=True)

    def state_of_layer_assigned(self, net: nn.Module, number: int) -> None:
        self.conv.load_state_dict({k: v.clone() * 0.5 for k, v in self.conv.state_dict().items()}, assign=True)

    def state_loaded(self, net: nn.Module, number: int) -> None:
        net.load_state_dict({name: value * 0.9 for name, value in net.state_dict().items()})

    def from_vector(self, net: nn.Module, number: int) -> None:
        vector = nn.utils.parameters_to_vector(net.parameters())
        nn.utils.vector_to_parameters(vector * 0.9, net.parameters())

    def swapped(self, net: nn.Module, number: int) -> None:
        torch.utils.swap_tensors(self.conv.weight, nn.Parameter(self.conv.weight.detach() * 0.5))

    def gradient_wanted(self, net: nn.Module, number: int) -> None:
        self.conv.weight.requires_grad_(number == 2)

    def tied(self, net: nn.Module, number: int) -> None:
        for other in net.modules():
            if isinstance(other, nn.Conv2d) and other is not self.conv and other.weight.shape == self.conv.weight.shape:
                other.weight = self.conv.weight

    def to_double_again(self, net: nn.Module, number: int) -> None:
        net.float().double()

    def initialized(self, net: nn.Module, number: int) -> None:
        nn.init.constant_(self.conv.weight, 0.1 * number)
        self.conv.reset_parameters()

    def bias_removed(self, net: nn.Module, number: int) -> None:
        self.conv.bias = None

    def tensor_kept(self, net: nn.Module, number: int) -> None:
        del self.conv.weight
        self.conv.weight = torch.full((self.conv.out_channels, self.conv.in_channels, 3, 3), 0.1).double()


class HooksBetween(Edited):
    """Hooks that the user adds before the second call, and removes before the third."""

    def setup(self, width: int, dice: random.Random) -> None:
        super().setup(width, dice)
        self.seen: list[Any] = []

    def _put(self, number: int, register: Any) -> None:
        if number == 1:
            self.seen.append("added")
            _HANDLES[self] = register()
        elif self in _HANDLES:
            _HANDLES.pop(self).remove()

    def forward_hook(self, net: nn.Module, number: int) -> None:
        self._put(number, lambda: self.conv.register_forward_hook(lambda _m, _a, result: result * 2))

    def hook_that_reads(self, net: nn.Module, number: int) -> None:
        self._put(
            number, lambda: self.conv.register_forward_hook(lambda _m, _a, y: self.seen.append(y.detach().mean()))
        )

    def pre_hook(self, net: nn.Module, number: int) -> None:
        self._put(number, lambda: self.conv.register_forward_pre_hook(lambda _m, args: (args[0] - 0.5,)))

    def keyword_hook(self, net: nn.Module, number: int) -> None:
        def hook(_module: nn.Module, _args: Any, kwargs: Any, result: Tensor) -> Tensor:
            return result * (2 + len(kwargs))

        self._put(number, lambda: self.conv.register_forward_hook(hook, with_kwargs=True))

    def keyword_pre_hook(self, net: nn.Module, number: int) -> None:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            return (args[0].tanh(),), kwargs

        self._put(number, lambda: self.register_forward_pre_hook(hook, with_kwargs=True))

    def prepended(self, net: nn.Module, number: int) -> None:
        self.conv.register_forward_hook(lambda _m, _a, result: result + 1)
        self._put(
            number,
            lambda: self.conv.register_forward_hook(lambda _m, _a, y: y * 2, prepend=True, always_call=True),
        )

    def root_hook(self, net: nn.Module, number: int) -> None:
        def hook(_module: nn.Module, args: Any) -> Any:
            self.seen.append(len(args))
            return (args[0] * 0.5, *args[1:])

        self._put(number, lambda: net.register_forward_pre_hook(hook))

    def backward_hook(self, net: nn.Module, number: int) -> None:
        self._put(
            number, lambda: self.conv.register_full_backward_hook(lambda _m, _i, _o: self.seen.append("backward"))
        )

    def backward_hook_that_alters(self, net: nn.Module, number: int) -> None:
        def hook(_module: nn.Module, given: Any, _out: Any) -> Any:
            return tuple(None if g is None else g * 2 for g in given)

        self._put(number, lambda: self.conv.register_full_backward_hook(hook))

    def backward_pre_hook(self, net: nn.Module, number: int) -> None:
        self._put(number, lambda: self.conv.register_full_backward_pre_hook(lambda _m, out: (out[0] * 0.5,)))

    def parameter_hook(self, net: nn.Module, number: int) -> None:
        self._put(number, lambda: self.conv.weight.register_hook(lambda grad: grad * 0.5))

    def accumulated_hook(self, net: nn.Module, number: int) -> None:
        def hook(parameter: Tensor) -> None:
            self.seen.append(tuple(parameter.grad.shape))

        self._put(number, lambda: self.conv.weight.register_post_accumulate_grad_hook(hook))

    def global_hook(self, net: nn.Module, number: int) -> None:
        self.seen.append("added" if number == 1 else "removed")

    def around(self) -> contextlib.AbstractContextManager[Any]:
        added = self.how == "global_hook" and self.seen[-1:] == ["added"]
        return self._global_hook() if added else contextlib.nullcontext()

    @contextlib.contextmanager
    def _global_hook(self) -> Iterator[None]:
        def hook(module: nn.Module, _args: Any, result: Any) -> Any:
            return result * 0.5 if module is self.conv else result

        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


# Not in attributes: a handle's number is another one in each run, and attributes are compared.
_HANDLES: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class ForwardsBetween(Edited):
    """Forwards that are replaced between two calls, and removed."""

    def setup(self, width: int, dice: random.Random) -> None:
        super().setup(width, dice)
        self.act = _Act()

    def run(self, y: Tensor) -> Tensor:
        return self.act(y) * self.factor

    def of_layer(self, net: nn.Module, number: int) -> None:
        if number == 1:
            self.conv.forward = lambda x: F.conv2d(x, self.conv.weight, padding=1) * 2
        else:
            self.conv.__dict__.pop("forward", None)

    def of_layer_by_dictionary(self, net: nn.Module, number: int) -> None:
        original = self.conv.forward
        self.conv.__dict__["forward"] = lambda x: original(x).tanh()

    def method(self, net: nn.Module, number: int) -> None:
        factor = VALUES[number]
        self.act.forward = types.MethodType(lambda owner, x: x.relu() * factor, self.act)

    def of_class(self, net: nn.Module, number: int) -> None:
        _Act.forward = (lambda owner, x: x.tanh(), _PLAIN_FORWARD)[number - 1]

    def wrapped_class(self, net: nn.Module, number: int) -> None:
        original, factor = _Act.forward, VALUES[number]
        _Act.forward = lambda owner, x: original(owner, x) * factor

    def own_method(self, net: nn.Module, number: int) -> None:
        factor = VALUES[number]
        self.run = lambda y: y * factor

    def other_class(self, net: nn.Module, number: int) -> None:
        self.act.__class__ = (nn.Tanh, _Act)[number - 1]

    def other_module(self, net: nn.Module, number: int) -> None:
        self.act = (nn.Tanh(), nn.Sequential(nn.ReLU(), nn.Sigmoid()))[number - 1]

    def of_the_network(self, net: nn.Module, number: int) -> None:
        network = _network(net)
        if number == 1:
            net.forward = lambda image, *args, **kwargs: type(network).forward(network, image * 0.5, *args, **kwargs)


class _Act(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


_PLAIN_FORWARD = _Act.forward
watch("forward of an activation", _Act, "forward")


class _Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.limit = 0.15

    def forward(self, weight: Tensor) -> Tensor:
        return weight.clamp(-self.limit, self.limit)


class Parametrized(Foreign):
    """Weights that are computed from other parameters."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.second = nn.Conv2d(width, width, 3, padding=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            {
                "old_weight_norm": lambda: nn.utils.weight_norm(self.second),
                "weight_norm": lambda: parametrizations.weight_norm(self.second),
                "old_spectral_norm": lambda: nn.utils.spectral_norm(self.second),
                "spectral_norm": lambda: parametrizations.spectral_norm(self.second),
                "orthogonal": lambda: parametrizations.orthogonal(self.second),
                "own": lambda: register_parametrization(self.second, "weight", _Clamped()),
                "removed_later": lambda: register_parametrization(self.second, "weight", _Clamped()),
                "limit_changed": lambda: register_parametrization(self.second, "weight", _Clamped()),
            }.get(self.how, lambda: None)()

    variations = (
        "old_weight_norm",
        "weight_norm",
        "old_spectral_norm",
        "spectral_norm",
        "orthogonal",
        "own",
        "removed_later",
        "limit_changed",
        "added_later",
        "old_added_later",
        "cached",
    )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "cached":
            with parametrize.cached():
                return self.second(self.second(y))
        return self.second(y)

    def change(self, net: nn.Module, number: int) -> None:
        if self.how == "removed_later" and number == 2:
            parametrize.remove_parametrizations(self.second, "weight")
        elif self.how == "limit_changed":
            self.second.parametrizations.weight[0].limit = 0.1 / number
        elif self.how in ("added_later", "cached") and number == 1:
            register_parametrization(self.second, "weight", _Clamped())
        elif self.how == "old_added_later" and number == 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(self.second)


class BuffersAssigned(Foreign):
    """Buffers that the forward assigns again or writes, and reads as Python values."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("levels", torch.tensor([1.0, 2.0]), persistent=False)

    def assigned(self, y: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + y.mean((0, 2, 3)).detach() * 0.1
        return y - self.mean[:, None, None]

    def assigned_in_training(self, y: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean = torch.lerp(self.mean, y.mean((0, 2, 3)), 0.2)
        return y * (1 + self.mean[:, None, None])

    def written(self, y: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(y.detach().amax((0, 2, 3)), alpha=0.1)
        return y - self.mean[:, None, None]

    def registered_again(self, y: Tensor) -> Tensor:
        self.register_buffer("mean", y.mean((0, 2, 3)).detach())
        return y.relu()

    def first_call(self, y: Tensor) -> Tensor:
        if not self.ready:
            self.mean.copy_(y.mean((0, 2, 3)).detach())
            self.ready.fill_(True)
        return y - self.mean[:, None, None]

    def item_as_scale(self, y: Tensor) -> Tensor:
        return y * (1 + self.levels[1].item())

    def item_as_count(self, y: Tensor) -> Tensor:
        self.count += 1
        for _ in range(int(self.count)):
            y = y * 1.1
        return y

    def item_as_branch(self, y: Tensor) -> Tensor:
        self.count.add_(1)
        return y.relu() if self.count.item() % 2 else y.tanh()

    def truth(self, y: Tensor) -> Tensor:
        return y.relu() if self.levels.sum() > 3 else y.tanh()

    def to_list(self, y: Tensor) -> Tensor:
        return y * sum(self.levels.tolist())

    def as_array(self, y: Tensor) -> Tensor:
        return y * float(self.levels.numpy().max())

    def in_dictionary(self, y: Tensor) -> Tensor:
        self._buffers["mean"] = self._buffers["mean"] + 1
        return y - self.mean[:, None, None]

    def change(self, net: nn.Module, number: int) -> None:
        self.levels = torch.tensor([1.0, VALUES[number]], dtype=torch.float64)
        if self.how == "first_call" and number == 2:
            self.ready.fill_(False)


class LayerList(Foreign):
    """Layers in containers that change."""

    def setup(self, width: int, dice: random.Random) -> None:
        self.list = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.named = nn.ModuleDict({"a": nn.Conv2d(width, width, 1), "b": nn.Tanh()})
        self.chain = nn.Sequential(nn.Conv2d(width, width, 1), nn.Tanh())
        self.calls, self.used = [torch.relu, torch.tanh], 1
        self.plain = [self.list[0], self.named["b"]]

    def module_list(self, y: Tensor) -> Tensor:
        for layer in self.list:
            y = layer(y)
        return y

    def plain_list(self, y: Tensor) -> Tensor:
        for layer in self.plain:
            y = layer(y)
        return y

    def functions(self, y: Tensor) -> Tensor:
        for call in self.calls:
            y = call(y)
        return y

    def names(self, y: Tensor) -> Tensor:
        for name, layer in self.named.items():
            y = layer(y) if name != "skip" else y
        return y

    def sequence(self, y: Tensor) -> Tensor:
        return self.chain[1:](self.chain(y))

    def prefix(self, y: Tensor) -> Tensor:
        for layer in list(self.list)[: self.used]:
            y = layer(y)
        return y

    def children_of(self, y: Tensor) -> Tensor:
        for layer in self.chain.children():
            y = layer(y)
        return y

    def by_number(self, y: Tensor) -> Tensor:
        return getattr(self.list, str(self.used))(y)

    def reordered_by_forward(self, y: Tensor) -> Tensor:
        self.calls.append(self.calls.pop(0))
        return self.calls[0](y)

    def change(self, net: nn.Module, number: int) -> None:
        if number == 1:
            self.list.append(nn.Sigmoid())
            self.plain.append(torch.sigmoid)
            self.calls.insert(0, torch.sin)
            self.named["skip"] = nn.ReLU()
            self.chain.append(nn.Sigmoid())
            self.used = 2
        else:
            del self.list[0]
            self.plain.pop(0)
            self.calls.reverse()
            del self.named["a"]
            self.chain[1] = nn.ReLU()
            self.used = 0


class NormsBetween(Edited):
    """Norms whose options and statistics change."""

    def setup(self, width: int, dice: random.Random) -> None:
        super().setup(width, dice)
        self.norm = nn.BatchNorm2d(width)

    def run(self, y: Tensor) -> Tensor:
        return self.norm(y)

    def frozen(self, net: nn.Module, number: int) -> None:
        self.norm.eval()

    def frozen_by_train(self, net: nn.Module, number: int) -> None:
        self.norm.train = lambda mode=True: self.norm
        self.norm.training = False

    def statistics_dropped(self, net: nn.Module, number: int) -> None:
        self.norm.track_running_stats = False
        self.norm.running_mean = self.norm.running_var = None

    def momentum(self, net: nn.Module, number: int) -> None:
        self.norm.__dict__["momentum"] = (None, 0.5)[number - 1]

    def deep_copied(self, net: nn.Module, number: int) -> None:
        self.norm = copy.deepcopy(self.norm)

    def replaced_by_identity(self, net: nn.Module, number: int) -> None:
        self.norm = nn.Identity()
