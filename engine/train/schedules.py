"""Learning rate schedules of a stage, as functions of the step alone, so that resumed runs get the same rates."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import GigamorphError
from ..models.pretrained import import_timm
from .stages import Stage

Factor = Callable[[int], float]

# According to PyTorch's documentation these are stepped after each batch, all others after each epoch.
_PER_STEP = {"onecyclelr", "cycliclr"}
# These need functions, other schedules, or a score (see `Stage.plateau`).
_UNFIT = {"lrscheduler", "lambdalr", "multiplicativelr", "sequentiallr", "chainedscheduler", "reducelronplateau"}


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
    own = {"constant": _constant, "cosine": _cosine, "linear": _linear}.get(stage.schedule)
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


def _constant(done: float) -> float:
    return 1.0


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(done: float) -> float:
    return 1 - done


def _of_torch(stage: Stage, steps_of_epoch: int) -> Factor:
    there = {
        key.lower(): value
        for key, value in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(value)
        and issubclass(value, torch.optim.lr_scheduler.LRScheduler)
        and key.lower() not in _UNFIT
        and not key.startswith("_")
    }
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
    rate = {"max_lr": _rate(stage)} if name == "onecyclelr" else {}
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
        return rates[step // every] / _rate(stage)

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
        return float(optimizer.param_groups[0]["lr"]) / _rate(stage)

    return factor


def _made(stage: Stage, make: Callable[[torch.optim.Optimizer], Any]) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer with the stage's rate, and its schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=_rate(stage))
    try:
        return optimizer, make(optimizer)
    except Exception as error:  # any error that the class raises for invalid values
        listed = ", ".join(f"{key}={value!r}" for key, value in stage.schedule_options.items()) or "no options"
        raise GigamorphError(f"cannot make schedule {stage.schedule!r} with {listed}: {error}") from error


def _rate(stage: Stage) -> float:
    return stage.lr or 1.0  # any factor of a rate of 0 is 0
