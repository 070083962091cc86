"""Whether there is what a run asks for by name, before any image is read: a look at all images may take hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..models.registry import create_model
from ..morph.files import recipe_of
from .loggers import require_callbacks, require_loggers
from .optimizers import make_optimizer
from .options import TrainOptions
from .schedules import factor_of
from .stages import trainable_names


def check_choices(options: TrainOptions, channels: int, loggers: Sequence[str], callbacks: Sequence[str]) -> None:
    """Look for optimizers, schedules, parts of the network, loggers and callbacks.

    The network is built where parts of it are named (`freeze`, rates of their own); those of a grown one, which has
    other parts than the network that it began as, are looked for when it is built to be trained.

    Raises:
        GigamorphError: one that is not there, or does not take its options.
    """
    require_loggers(loggers)
    require_callbacks(callbacks)
    stages = options.made_stages(validated=True)
    for stage in stages:
        factor_of(stage, 1)
        make_optimizer(nn.Conv2d(1, 1, 1), replace(stage, rates=()))
    if any(stage.frozen or stage.rates for stage in stages) and not _grown(options.weights):
        with torch.random.fork_rng(devices=[]):
            model = create_model(options.model, in_channels=channels)
        for stage in stages:
            trainable_names(model, stage)
            make_optimizer(model, stage)


def _grown(weights: str | None) -> bool:
    return weights is not None and Path(weights).is_file() and bool(recipe_of(weights).morphs)
