"""Optimizers of `torch.optim` and timm by name, with learning rate and decay per group of parameters."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import GigamorphError
from ..models.pretrained import import_timm
from .stages import Stage, matching

_UNFIT = {
    "lbfgs": "evaluates the loss several times per step",
    "muon": "accepts only matrices, not kernels or biases; timm:muon flattens kernels and passes biases to AdamW",
    "sparseadam": "accepts only sparse gradients",
}
"""Unsupported optimizers of `torch.optim`, and why."""
_NEAREST = 5  # similar names of timm's hundred optimizers in an error


def make_optimizer(module: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters; weights (two or more axes) decay, biases and norms do not.

    Groups with a learning rate of their own come last; ``base`` is a group's rate before any schedule.

    Raises:
        GigamorphError: if the optimizer is unknown, or does not accept these options.
    """
    rates = _rates(module, stage)
    names = [name for name, _ in module.named_parameters()]
    undecayed = {name for pattern in stage.undecayed for name in matching(names, pattern, stage)}
    groups = []
    for rate in dict.fromkeys([stage.lr, *rates.values()]):
        learning = {n: p for n, p in module.named_parameters() if p.requires_grad and rates.get(n, stage.lr) == rate}
        for decay in (True, False):
            some = [p for n, p in learning.items() if (p.ndim > 1 and n not in undecayed) == decay]
            weight_decay = stage.weight_decay if decay else 0.0
            groups.append({"params": some, "weight_decay": weight_decay, "lr": rate, "base": rate})
    groups = [group for group in groups if group["params"]]
    make = find_optimizer(stage.optimizer)
    if own := {"lr", "weight_decay"} & stage.optimizer_options.keys():  # the groups' own values would override them
        name = sorted(own)[0]
        raise GigamorphError(f"cannot set {name} in the options of {stage.optimizer!r}; set optimizer.{name}")
    # Files have lists where PyTorch has pairs, such as betas.
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in stage.optimizer_options.items()}
    if stage.optimizer.lower() == "sgd":
        options = {"momentum": stage.momentum, "nesterov": stage.momentum > 0, **options}
    taken = inspect.signature(make).parameters
    if stage.weight_decay and "weight_decay" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise GigamorphError(f"optimizer {stage.optimizer!r} has no weight decay; set weight_decay to 0")
    try:
        return make(groups, lr=stage.lr, **options)
    except Exception as error:  # any error that the class raises for invalid values
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise GigamorphError(
            f"cannot make optimizer {stage.optimizer!r}{' with ' * bool(listed)}{listed}: {error}"
        ) from error


def find_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class of an optimizer: of `torch.optim` (case-insensitive), or ``timm:NAME``.

    Raises:
        GigamorphError: if the name is unknown or unsupported.
    """
    if name.startswith("timm:"):
        import_timm(f"optimizer {name!r}")
        from timm.optim import get_optimizer_class, list_optimizers

        names = [str(known) for known in list_optimizers()]
        if (own := name.removeprefix("timm:")) not in names:
            near = difflib.get_close_matches(own, names, _NEAREST)
            hint = f"did you mean {', '.join(near)}?" if near else "see timm.optim.list_optimizers()"
            raise GigamorphError(f"unknown optimizer {name!r}; timm has {len(names)}; {hint}")
        return get_optimizer_class(own, bind_defaults=True)
    if name.lower() in _UNFIT:
        raise GigamorphError(f"cannot use optimizer {name!r} because it {_UNFIT[name.lower()]}")
    there = {key.lower(): value for key, value in vars(torch.optim).items() if _is_optimizer(value)}
    if name.lower() not in there:
        names = ", ".join(sorted(there))
        raise GigamorphError(f"unknown optimizer {name!r}; use one of {names}, or timm:NAME")
    return there[name.lower()]


def _is_optimizer(found: Any) -> bool:
    base = torch.optim.Optimizer
    usable = isinstance(found, type) and issubclass(found, base) and found is not base
    return usable and found.__name__.lower() not in _UNFIT


def _rates(module: nn.Module, stage: Stage) -> dict[str, float]:
    """The learning rates of parameters whose rate differs from the stage's, by name."""
    names = [name for name, _ in module.named_parameters()]
    rates = {}
    if stage.layer_decay != 1:
        order = parts(names)
        rates = {name: stage.lr * stage.layer_decay ** (len(order) - 1 - order.index(part_of(name))) for name in names}
    return rates | {name: rate for pattern, rate in stage.rates for name in matching(names, pattern, stage)}


def parts(names: Sequence[str]) -> list[str]:
    """The parts of a network that these parameters belong to, from input to output."""
    return list(dict.fromkeys(part_of(name) for name in names))


def part_of(name: str) -> str:
    """The part of a parameter: ``layer1.0`` for ``layer1.0.conv1.weight``, ``fc`` for ``fc.bias``."""
    pieces = name.split(".")[:-1] or [name]
    until = next((i + 1 for i, piece in enumerate(pieces) if piece.isdigit()), 1)
    return ".".join(pieces[:until])
