"""What is fitted to a finished network: hooks, parametrizations, pruning, frozen parameters."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

FITTINGS: dict[str, Callable[[nn.Module, random.Random], None]] = {}


def fitting(call: Callable[[nn.Module, random.Random], None]) -> Callable[[nn.Module, random.Random], None]:
    """Registers something that is done to a network; it does nothing where it finds nothing."""
    FITTINGS[call.__name__] = call
    return call


def some(net: nn.Module, dice: random.Random, *kinds: type[nn.Module]) -> nn.Module | None:
    """A module of the network, of some of these kinds."""
    found = [m for name, m in net.named_modules() if name and isinstance(m, kinds or nn.Module)]
    return dice.choice(found) if found else None


class Collector:
    """A hook that keeps what passes."""

    def __init__(self, how: str):
        self.how, self.kept = how, []

    def __call__(self, _module: nn.Module, _args: Any, result: Any) -> None:
        result = result[0] if isinstance(result, (list, tuple)) else result
        if self.how == "map":
            self.kept.append(result.detach())
        elif self.how == "mean":
            self.kept.append(result.mean().detach())
        elif self.how == "live":
            self.kept.append(result.mean())
        else:
            self.kept.append(tuple(result.shape))


def _piece(net: nn.Module, dice: random.Random) -> nn.Module:
    pieces = list(net.pieces)
    return dice.choice(pieces) if pieces else net.stem


@fitting
def collect(net: nn.Module, dice: random.Random) -> None:
    module = _piece(net, dice)
    hook = Collector(dice.choice(["map", "mean", "live", "shape"]))
    module.collector = hook.kept
    module.register_forward_hook(hook)


@fitting
def alter_result(net: nn.Module, dice: random.Random) -> None:
    if dice.random() < 0.5:
        _piece(net, dice).register_forward_hook(lambda _module, _args, result: result * 0.5)
    else:
        _piece(net, dice).register_forward_hook(lambda _m, _a, kwargs, result: result.tanh(), with_kwargs=True)


@fitting
def alter_input(net: nn.Module, dice: random.Random) -> None:
    _piece(net, dice).register_forward_pre_hook(lambda _module, args: (args[0] - 0.25,))


@fitting
def alter_result_once(net: nn.Module, dice: random.Random) -> None:
    """A hook that removes itself, or adds another, when it runs."""
    module, again = _piece(net, dice), dice.random() < 0.5

    def once(module: nn.Module, _args: Any, result: Tensor) -> Tensor:
        handle.remove()
        if again:
            module.register_forward_hook(lambda _module, _args, result: result + 0.25)
        return result * 2

    handle = module.register_forward_hook(once)


@fitting
def ordered_hooks(net: nn.Module, dice: random.Random) -> None:
    """Hooks whose order counts, one of which runs always."""
    module = _piece(net, dice)
    module.register_forward_hook(lambda _module, _args, result: result * 1.5)
    module.register_forward_hook(lambda _module, _args, result: result + 1, prepend=True, always_call=True)


@fitting
def backward_hook_that_alters(net: nn.Module, dice: random.Random) -> None:
    module = _piece(net, dice)
    module.register_full_backward_hook(lambda _module, given, _out: tuple(g if g is None else g * 2 for g in given))


@fitting
def root_hooks(net: nn.Module, dice: random.Random) -> None:
    how = dice.choice(["input", "count", "collect"])
    if how == "input":
        net.register_forward_pre_hook(lambda _module, args: (args[0] * 0.5, *args[1:]) if args else None)
    elif how == "count":
        net.hooked = [0]

        def count(module: nn.Module, _args: Any, _result: Any) -> None:
            net.hooked[0] += 1

        net.register_forward_hook(count)
    else:
        kept = net.hooked = []
        net.register_forward_hook(lambda _module, _args, result: kept.append(type(result).__name__))


@fitting
def backward_hook(net: nn.Module, dice: random.Random) -> None:
    _piece(net, dice).register_full_backward_hook(lambda _module, _in, _out: None)


@fitting
def parameter_hook(net: nn.Module, dice: random.Random) -> None:
    found = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if not found:
        return
    parameter = dice.choice(found)
    if dice.random() < 0.5:
        parameter.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    else:

        def halve(p: Tensor) -> None:
            p.grad.mul_(0.5)

        parameter.register_post_accumulate_grad_hook(halve)


@fitting
def freeze(net: nn.Module, dice: random.Random) -> None:
    module = dice.choice([net.stem, _piece(net, dice)])
    module.requires_grad_(False)


@fitting
def freeze_all(net: nn.Module, dice: random.Random) -> None:
    net.requires_grad_(False)


def _is_plain(module: nn.Module | None) -> bool:
    return module is not None and not parametrize.is_parametrized(module) and "weight" in module._parameters


@fitting
def weight_norm(net: nn.Module, dice: random.Random) -> None:
    module = some(net, dice, nn.Conv2d)
    if _is_plain(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (nn.utils.weight_norm if dice.random() < 0.5 else parametrizations.weight_norm)(module)


@fitting
def spectral_norm(net: nn.Module, dice: random.Random) -> None:
    module = some(net, dice, nn.Conv2d, nn.Linear)
    if _is_plain(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (nn.utils.spectral_norm if dice.random() < 0.5 else parametrizations.spectral_norm)(module)


@fitting
def pruned(net: nn.Module, dice: random.Random) -> None:
    module = some(net, dice, nn.Conv2d)
    if _is_plain(module) and module.weight.is_contiguous():  # which pruning asks for
        prune.l1_unstructured(module, "weight", amount=0.4)


class Doubled(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2 - weight.detach()


@fitting
def own_parametrization(net: nn.Module, dice: random.Random) -> None:
    module = some(net, dice, nn.Conv2d)
    if _is_plain(module):
        parametrize.register_parametrization(module, "weight", Doubled())


@fitting
def channels_last(net: nn.Module, dice: random.Random) -> None:
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


@fitting
def eval_part(net: nn.Module, dice: random.Random) -> None:
    _piece(net, dice).eval()
