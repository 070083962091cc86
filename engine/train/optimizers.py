"""Optimizers and learning rate schedules of `torch.optim` and timm by name, with rates per group of parameters.

Schedules are functions of the step alone, so that resumed runs get the same rates.
"""

from __future__ import annotations

import difflib
import inspect
import math
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
    there = _classes_in(torch.optim, torch.optim.Optimizer, {"optimizer", *_UNFIT})
    if name.lower() not in there:
        names = ", ".join(sorted(there))
        raise GigamorphError(f"unknown optimizer {name!r}; use one of {names}, or timm:NAME")
    return there[name.lower()]


def _classes_in(module: Any, base: type, unfit: set[str]) -> dict[str, Any]:
    """The public classes of a module that derive from a base class, by name in lower case, without the unfit ones."""
    public = {key.lower(): value for key, value in vars(module).items() if not key.startswith("_")}
    classes = {key: value for key, value in public.items() if isinstance(value, type) and issubclass(value, base)}
    return {key: value for key, value in classes.items() if key not in unfit}


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


Factor = Callable[[int], float]

# Of the fraction of the steps after the warm-up.
_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}
# According to PyTorch's documentation these are stepped after each batch, all others after each epoch.
_PER_STEP = {"onecyclelr", "cycliclr"}
# These need functions, other schedules, or a score (see `Stage.plateau`).
_UNUSABLE = {"lrscheduler", "lambdalr", "multiplicativelr", "sequentiallr", "chainedscheduler", "reducelronplateau"}


def factor_of(stage: Stage, steps_of_epoch: int) -> Factor:
    """The factor of the learning rate at each optimizer step of a stage, counted from 0.

    Schedules are "constant"; "cosine" and "linear", which fall to zero after the warm-up; a class of
    `torch.optim.lr_scheduler`, stepped after each epoch (OneCycleLR and CyclicLR after each step); or ``timm:NAME``.
    Counts of PyTorch's classes (T_max, total_steps, total_iters) default to those of the stage. Rates (eta_min, max_lr,
    base_lr, timm's min_lr) are absolute; parameters with another rate are scaled in proportion. The warm-up is linear:
    it precedes the first three schedules, and multiplies the others.

    Args:
        stage: settings of the stage.
        steps_of_epoch: optimizer steps per epoch.

    Raises:
        GigamorphError: if the schedule is unknown, or does not accept these options.
    """
    steps = max(stage.epochs * steps_of_epoch, 1)
    share = (0.0 if stage.schedule == "constant" else 0.1) if stage.warmup is None else stage.warmup
    if not 0 <= share < 1:
        raise GigamorphError(f"warmup must be a fraction of the steps, at least 0 and below 1, not {share}")
    own = _SHAPES.get(stage.schedule)
    # As in the published recipes, a warm-up has at least one step.
    warmup = max(1, int(steps * share)) if share else 0
    if own is not None:
        if stage.schedule_options:
            raise GigamorphError(
                f"schedule {stage.schedule!r} has no options; remove {', '.join(stage.schedule_options)}"
            )
        rest = max(1, steps - warmup)
        return lambda step: (step + 1) / warmup if step < warmup else own(min((step - warmup) / rest, 1.0))
    named = _of_timm if stage.schedule.startswith("timm:") else _of_torch
    after = named(stage, steps_of_epoch)
    return lambda step: after(step) * min((step + 1) / warmup if warmup else 1.0, 1.0)


def _of_torch(stage: Stage, steps_of_epoch: int) -> Factor:
    there = _classes_in(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler, _UNUSABLE)
    name = stage.schedule.lower()
    if name == "reducelronplateau":
        raise GigamorphError(f"cannot use schedule {stage.schedule!r}; set schedule.plateau = EPOCHS instead")
    if name not in there:
        raise GigamorphError(
            f"unknown schedule {stage.schedule!r}; use one of constant, cosine, linear, "
            f"{', '.join(sorted({value.__name__ for value in there.values()}))}, or timm:NAME"
        )
    every = 1 if name in _PER_STEP else max(steps_of_epoch, 1)
    taken = inspect.signature(there[name]).parameters
    count = stage.epochs * max(steps_of_epoch, 1) // every
    own = stage.schedule_options.get("total_steps")
    if isinstance(own, int) and own < count:
        raise GigamorphError(f"schedule {stage.schedule!r}: total_steps is {own}, but the run has {count}; omit it")
    counted = {key: count for key in ("T_max", "total_steps", "total_iters") if key in taken}
    rate = {"max_lr": _rate_of(stage)} if name == "onecyclelr" else {}
    still = {"cycle_momentum": False} if "cycle_momentum" in taken else {}

    def make(optimizer: torch.optim.Optimizer) -> Any:
        return there[name](optimizer, **{**counted, **rate, **still, **stage.schedule_options})

    optimizer, scheduler = _made(stage, make)
    rates = [float(optimizer.param_groups[0]["lr"])]

    def factor(step: int) -> float:
        while len(rates) <= step // every:
            optimizer.step()
            scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return rates[step // every] / _rate_of(stage)

    return factor


def _of_timm(stage: Stage, steps_of_epoch: int) -> Factor:
    import_timm(f"schedule {stage.schedule!r}")
    from timm.scheduler import create_scheduler_v2

    counts = {"num_epochs": stage.epochs, "step_on_epochs": False, "updates_per_epoch": max(steps_of_epoch, 1)}
    name = stage.schedule.removeprefix("timm:")

    def make(optimizer: torch.optim.Optimizer) -> Any:
        made = create_scheduler_v2(optimizer, name, **{**counts, **stage.schedule_options})[0]
        if made is None or name == "plateau":
            raise ValueError("timm has cosine, tanh, step, multistep, poly")
        return made

    optimizer, scheduler = _made(stage, make)

    def factor(step: int) -> float:
        scheduler.step_update(step)
        return float(optimizer.param_groups[0]["lr"]) / _rate_of(stage)

    return factor


def _made(stage: Stage, make: Callable[[torch.optim.Optimizer], Any]) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer with the stage's rate, and its schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=_rate_of(stage))
    try:
        return optimizer, make(optimizer)
    except Exception as error:  # any error that the class raises for invalid values
        listed = ", ".join(f"{key}={value!r}" for key, value in stage.schedule_options.items()) or "no options"
        raise GigamorphError(f"cannot make schedule {stage.schedule!r} with {listed}: {error}") from error


def _rate_of(stage: Stage) -> float:
    return stage.lr or 1.0  # any factor of a rate of 0 is 0
