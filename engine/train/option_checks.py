"""Checks that all names in a run's options exist, before images are read, which may take hours."""

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
from .loggers import require_callbacks, require_loggers
from .optimizers import factor_of, make_optimizer
from .options import TrainOptions
from .stages import Stage, require_multiple, trainable_names


def check_choices(
    options: TrainOptions, channels: int, loggers: Sequence[str], callbacks: Sequence[str], at_once: int = 1
) -> None:
    """Check the network, its weights, optimizers, schedules, parameter patterns, loggers and callbacks.

    Parameter patterns (`freeze`, `rates`) are matched against the network. Those of a grown network, whose parameters
    differ from the original network's, are checked when it is built for training.

    Args:
        options: of the run.
        channels: of the images.
        loggers, callbacks: names, see `loggers`.
        at_once: images that are computed concurrently.

    Raises:
        GigamorphError: if a name is unknown or does not accept its options, or if steps cannot be distributed to the
            processes.
    """
    require_loggers(loggers)
    require_callbacks(callbacks)
    stages = options.made_stages(validated=True)
    check_stages(stages, at_once)
    _require_weights(options.weights)
    named = any(stage.frozen or stage.rates for stage in stages)
    if _grown(options.weights):
        return
    spec = None if is_folder(options.model) else Spec.parse(options.model)
    if not named and spec is not None and spec.kind not in ("", "timm"):  # user code may be slow: not called here
        with factory_of(spec):
            return
    model = _meta_network(options.model, channels)
    if named:
        check_stages(stages, at_once, model)


def check_stages(stages: Sequence[Stage], at_once: int = 1, module: nn.Module | None = None) -> None:
    """Refuse invalid stages before any work.

    Args:
        stages: the stages.
        at_once: batches that are computed concurrently.
        module: the trained module; without it, patterns are not checked.

    Raises:
        GigamorphError: if a pattern matches no parameter of the module, batches cannot be distributed to the processes,
            or an optimizer or schedule is unknown or does not accept its options.
    """
    for stage in stages:
        require_multiple(stage, at_once)
        factor_of(stage, 1)
        if module is None:
            make_optimizer(nn.Conv2d(1, 1, 1), replace(stage, rates=(), undecayed=()))
        else:
            trainable_names(module, stage)
            make_optimizer(module, stage)


def _require_weights(weights: str | None) -> None:
    if weights is not None and not weights.startswith(TIMM) and not Path(weights).exists():
        raise DataError(f"{weights}: no such weights file")


def _meta_network(name: str, channels: int) -> nn.Module:
    """The network on the meta device, or on the CPU if its constructor needs values."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build_model(name, in_channels=channels)
        except Exception:
            return build_model(name, in_channels=channels)


def _grown(weights: str | None) -> bool:
    if weights is None or not Path(weights).is_file():
        return False
    from ..morph.files import recipe_of  # imports all morphs

    return bool(recipe_of(weights).morphs)
