"""Whether there is what a run asks for by name, before any image is read: a look at all images may take hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import DataError
from ..models.folder import is_folder
from ..models.pretrained import TIMM
from ..models.registry import build_model, factory_of
from ..models.spec import Spec
from ..morph.files import recipe_of
from .loggers import require_callbacks, require_loggers
from .optimizers import make_optimizer
from .options import TrainOptions
from .schedules import factor_of
from .stages import require_deal, trainable_names


def check_choices(
    options: TrainOptions, channels: int, loggers: Sequence[str], callbacks: Sequence[str], at_once: int = 1
) -> None:
    """Look for the network, its weights, optimizers, schedules, parts of the network, loggers and callbacks.

    Parts of the network are looked for where they are named (`freeze`, rates of their own); those of a grown one, which
    has other parts than the network that it began as, when it is built to be trained.

    Args:
        at_once: images that are computed at a time, by processes.

    Raises:
        GigamorphError: one that is not there, or does not take its options; steps that cannot be dealt to processes.
    """
    require_loggers(loggers)
    require_callbacks(callbacks)
    check_steps(options)
    stages = options.made_stages(validated=True)
    for stage in stages:
        require_deal(stage, at_once)
    _require_weights(options.weights)
    named = any(stage.frozen or stage.rates for stage in stages)
    if _grown(options.weights):
        return
    spec = None if is_folder(options.model) else Spec.parse(options.model)
    if not named and spec is not None and spec.kind not in ("", "timm"):  # the user's code may take long: called once
        with factory_of(spec):
            return
    model = _without_values(options.model, channels)
    for stage in stages if named else ():
        trainable_names(model, stage)
        make_optimizer(model, stage)


def check_steps(options: TrainOptions) -> None:
    """Look for the optimizers and schedules alone, without a network.

    Raises:
        GigamorphError: one that is not there, or does not take its options.
    """
    for stage in options.made_stages(validated=True):
        factor_of(stage, 1)
        make_optimizer(nn.Conv2d(1, 1, 1), replace(stage, rates=()))


def _require_weights(weights: str | None) -> None:
    if weights is not None and not weights.startswith(TIMM) and not Path(weights).exists():
        raise DataError(f"{weights}: no such weights file")


def _without_values(name: str, channels: int) -> nn.Module:
    """The network without memory for its parameters, where its code asks for no values while it is built."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build_model(name, in_channels=channels)
        except Exception:
            return build_model(name, in_channels=channels)


def _grown(weights: str | None) -> bool:
    return weights is not None and Path(weights).is_file() and bool(recipe_of(weights).morphs)
