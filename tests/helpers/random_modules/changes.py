"""What a user does to a network between two steps.

A change gets the network as the user holds it (stock, or what `accelerate` returned) and returns the one that is held
from then on.
"""

from __future__ import annotations

import copy
import io
import random
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import attributes, effects, hooks, objects
from .piece import Piece, conv, ramp

CHANGES: dict[str, Callable[[nn.Module, random.Random], nn.Module | None]] = {}
_OFTEN = {"knob": 4, "norm_momentum": 2, "norm_eps": 2, "conv_geometry": 2, "replace_forward": 2, "root_attribute": 2}


def change(call: Callable[[nn.Module, random.Random], nn.Module | None]) -> Callable[..., nn.Module | None]:
    """Registers a change; it does nothing where it finds nothing."""
    call.weight = _OFTEN.get(call.__name__, 1)
    CHANGES[call.__name__] = call
    return call


def _norms(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


@change
def norm_momentum(net: nn.Module, dice: random.Random) -> None:
    for norm in _norms(net):
        norm.momentum = dice.choice([0.5, 0.02, None])


@change
def norm_eps(net: nn.Module, dice: random.Random) -> None:
    for module in net.modules():
        if hasattr(module, "eps"):
            module.eps = 0.1


@change
def reset_norms(net: nn.Module, dice: random.Random) -> None:
    for norm in _norms(net):
        norm.reset_running_stats()


@change
def dropout_p(net: nn.Module, dice: random.Random) -> None:
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 1.0 - module.p


@change
def conv_geometry(net: nn.Module, dice: random.Random) -> None:
    found = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.padding_mode == "zeros"]
    module, how = dice.choice(found), dice.choice(["stride", "padding", "dilation"])
    if how == "stride":
        module.stride = (2, 1) if module.stride == (1, 1) else (1, 1)
    elif how == "padding":
        module.padding = tuple(p + 1 for p in module.padding)
    elif module.kernel_size == (3, 3):
        module.dilation, module.padding = (2, 2), tuple(p + 1 for p in module.padding)


@change
def knob(net: nn.Module, dice: random.Random) -> None:
    pieces = [m for m in net.modules() if isinstance(m, Piece) and m.knobs]
    if pieces:
        piece = dice.choice(pieces)
        name = dice.choice(sorted(piece.knobs))
        setattr(piece, name, copy.deepcopy(dice.choice(piece.knobs[name])))


@change
def inside_attribute(net: nn.Module, dice: random.Random) -> None:
    """Something inside a list, a dictionary or a namespace."""
    for module in net.modules():
        if isinstance(module, attributes.Options):
            module.options["factor"] = 3.0
            module.options["acts"].append("tanh")
            module.space.factor = 3.0
            module.space.inner.act = "tanh"
        if isinstance(module, attributes.PlainTensor):
            module.several[0] = module.several[0] * 2
            module.named["b"]["c"] = module.named["b"]["c"] * 3
            module.scale.mul_(1.5)


@change
def kept_object(net: nn.Module, dice: random.Random) -> None:
    """An object that the network keeps is changed, or goes."""
    goes = dice.random() < 0.3
    for module in net.modules():
        if isinstance(module, objects.Kept) and goes:
            module.kept = module.other = None
        elif isinstance(module, objects.Kept) and isinstance(module.kept, list):
            module.kept.append(3)
        elif isinstance(module, objects.Kept) and isinstance(module.kept, objects.Box):
            module.kept.count += 3
        elif isinstance(module, objects.Collected):
            module.record.items.append(2)
            module.array += 1
            module.usual["calls"] -= 1


@change
def retied(net: nn.Module, dice: random.Random) -> None:
    """Weights that were one become two, or the other way round."""
    for module in net.modules():
        if isinstance(module, attributes.Tied):
            tied = module.second.weight is module.first.weight
            module.second.weight = nn.Parameter(module.first.weight.detach().clone()) if tied else module.first.weight


@change
def buffer_registered(net: nn.Module, dice: random.Random) -> None:
    for module in net.modules():
        if isinstance(module, effects.SharedBuffer):
            module.register_buffer("count", ramp(1) + 2, persistent=dice.random() < 0.5)


@change
def context_variable(net: nn.Module, dice: random.Random) -> None:
    """Undone by `reset`."""
    objects.GAIN.set(dice.choice([1.0, 2.0]))


@change
def class_attribute(net: nn.Module, dice: random.Random) -> None:
    """Undone by `reset`."""
    attributes.Options.factor = 2.5


@change
def global_setting(net: nn.Module, dice: random.Random) -> None:
    attributes.SETTING["scale"] = 0.7


def reset() -> None:
    """Undo what changes did outside of networks."""
    attributes.Options.factor = 1.5
    attributes.SETTING["scale"] = 1.5
    objects.GAIN.set(1.0)


@change
def root_attribute(net: nn.Module, dice: random.Random) -> None:
    if hasattr(net, "temperature"):
        net.temperature = dice.choice([0.5, 3.0])
    if hasattr(net, "offset"):
        net.offset = net.offset * 3
    net.skips = ()


@change
def replace_forward(net: nn.Module, dice: random.Random) -> None:
    pieces = list(net.pieces)
    if not pieces:
        return
    piece = dice.choice(pieces)
    original = type(piece).forward
    piece.forward = types.MethodType(lambda self, x: original(self, x) * 0.5, piece)


@change
def replace_module(net: nn.Module, dice: random.Random) -> None:
    if len(net.pieces):
        width = net.stem.out_channels
        net.pieces[dice.randrange(len(net.pieces))] = dice.choice(
            [nn.Identity(), nn.Tanh(), conv(width).double(), nn.BatchNorm2d(width).double()]
        )


@change
def replace_act(net: nn.Module, dice: random.Random) -> None:
    for module in net.modules():
        if isinstance(getattr(module, "act", None), nn.ReLU):
            module.act = nn.Sigmoid()


@change
def other_class(net: nn.Module, dice: random.Random) -> None:
    """A module becomes one of another class in place."""
    for module in net.modules():
        if type(module) is nn.ReLU:
            module.__class__ = nn.Sigmoid


@change
def toggle_gradients(net: nn.Module, dice: random.Random) -> None:
    for parameter in dice.sample(list(net.parameters()), 2):
        parameter.requires_grad_(not parameter.requires_grad)


@change
def part_to_eval(net: nn.Module, dice: random.Random) -> None:
    if len(net.pieces):
        dice.choice(list(net.pieces)).train(dice.random() < 0.3)


@change
def load_state(net: nn.Module, dice: random.Random) -> None:
    state = copy.deepcopy(net.state_dict())
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "running_var" not in name:
            value.mul_(0.9)
    net.load_state_dict(state)


@change
def assign_state(net: nn.Module, dice: random.Random) -> None:
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)


@change
def update_norms(net: nn.Module, dice: random.Random) -> None:
    """As stochastic weight averaging does it: norms without momentum, under no_grad."""
    images = ramp(1, net.stem.in_channels, 11, 13) * 3
    torch.optim.swa_utils.update_bn([images, images.sin()], net)


@change
def moving_average(net: nn.Module, dice: random.Random) -> nn.Module:
    """The network's exponential moving average takes its place."""
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(net)
    return averaged.module


@change
def deep_copy(net: nn.Module, dice: random.Random) -> nn.Module:
    return copy.deepcopy(net)


@change
def saved_and_loaded(net: nn.Module, dice: random.Random) -> None:
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    net.load_state_dict(torch.load(buffer, weights_only=False))


@change
def weights_in_place(net: nn.Module, dice: random.Random) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.95)


@change
def weights_data(net: nn.Module, dice: random.Random) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data * 0.95


@change
def new_parameter(net: nn.Module, dice: random.Random) -> None:
    net.stem.weight = nn.Parameter(net.stem.weight.detach() * 1.1)


@change
def hook_added(net: nn.Module, dice: random.Random) -> None:
    hooks.FITTINGS[dice.choice(["collect", "alter_result", "alter_input"])](net, dice)


@change
def fitted_later(net: nn.Module, dice: random.Random) -> None:
    hooks.FITTINGS[dice.choice(["weight_norm", "spectral_norm", "pruned", "own_parametrization", "freeze"])](net, dice)


@change
def hooks_removed(net: nn.Module, dice: random.Random) -> None:
    for module in net.modules():
        if isinstance(module, Piece):
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()


@change
def root_forward(net: nn.Module, dice: random.Random) -> None:
    """The root's forward is wrapped, as libraries do."""
    original = net.forward
    net.forward = lambda image, *args, **kwargs: original(image * 0.5, *args, **kwargs)


@change
def default_modes(net: nn.Module, dice: random.Random) -> None:
    net.train(dice.random() < 0.5)


@change
def apply_to_all(net: nn.Module, dice: random.Random) -> None:
    net.apply(lambda module: module.requires_grad_(True))
