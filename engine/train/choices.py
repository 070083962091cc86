"""Whether there is what a run asks for by name, before any image is read: a look at all images may take hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..models.registry import create_model
from .loggers import require_callbacks, require_loggers
from .optimizers import make_optimizer
from .options import TrainOptions
from .schedules import factor_of
from .stages import trainable_names


def check_choices(options: TrainOptions, channels: int, loggers: Sequence[str], callbacks: Sequence[str]) -> None:
    """Look for optimizers, schedules, parts of the network, loggers and callbacks.

    The network is built where parts of it are named (`freeze`, rates of their own).

    Raises:
        GigamorphError: one that is not there, or does not take its options.
    """
    require_loggers(loggers)
    require_callbacks(callbacks)
    stages = options.made_stages(validated=True)
    for stage in stages:
        factor_of(stage, 1)
        make_optimizer(nn.Conv2d(1, 1, 1), replace(stage, rates=()))
    if any(stage.frozen or stage.rates for stage in stages):
        with torch.random.fork_rng(devices=[]):
            model = create_model(options.model, in_channels=channels)
        for stage in stages:
            trainable_names(model, stage)
            make_optimizer(model, stage)
