"""Stages of training: trainable parameters, learning rates, and the modes of BatchNorm and dropout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from ..errors import GigamorphError
from ..torch_private import BatchNorm

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Stage:
    """One stage, with a new optimizer; patterns are matched against names by `fnmatch`."""

    name: str
    epochs: int
    lr: float
    trainable: tuple[str, ...] = ("*",)
    """Patterns of trainable parameters, or of modules with all their parameters; all others are frozen."""
    frozen: tuple[str, ...] = ()
    """Patterns of exceptions that are frozen."""
    rates: tuple[tuple[str, float], ...] = ()
    """Patterns of parameters with a learning rate that replaces ``lr``; the last matching pattern counts."""
    weight_decay: float = 0.0
    """Decay of weights, not of biases and norms. "adam" and "sgd" add it to the gradient, "adamw" decouples it."""
    undecayed: tuple[str, ...] = ()
    """Patterns of parameters without weight decay."""
    optimizer: str = "adam"
    """A class of `torch.optim` (case-insensitive), or ``timm:NAME``."""
    momentum: float = 0.9
    """Nesterov momentum of "sgd"; 0 for none."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of the optimizer, such as betas."""
    layer_decay: float = 1.0
    """Factor of the learning rate of each part of the network (a block of layers, see `parts`), relative to the next
    part; the last part has ``lr``."""
    batch_size: int = 1
    accumulate: int = 1
    """Batches per optimizer step, whose losses are averaged."""
    schedule: str = "constant"
    """"constant"; "cosine" and "linear", which fall to zero; or others, see `optimizers.factor_of`."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of the schedule."""
    warmup: float | None = None
    """Fraction of the stage's steps in which the rate rises; None means 0.1, or 0 for "constant"."""
    plateau: int | None = None
    """Divide the rate by ten after this many epochs without a better score."""
    patience: int | None = None
    """End the stage after this many epochs without a better score."""
    dropout: float | None = None
    """Probability of all dropout layers; None leaves them unchanged."""
    batch_norm: Literal["train", "eval", "trainable"] = "train"
    """"eval": all layers use their running statistics, unchanged; "trainable": only layers with frozen weights do."""
    clip: float | None = None
    """Maximum norm of the gradients of a step."""
    average: float | None = None
    """Decay of an exponential moving average of the weights, which is then scored and saved as the best."""


def trainable_names(module: nn.Module, stage: Stage) -> list[str]:
    """Names of a stage's trainable parameters, in the module's order.

    Raises:
        GigamorphError: if a pattern matches no parameter, or all are frozen.
    """
    names = [name for name, _ in module.named_parameters()]
    found = {name for pattern in stage.trainable for name in matching(names, pattern, stage)}
    found -= {name for pattern in stage.frozen for name in matching(names, pattern, stage)}
    if not found:
        raise GigamorphError(f"stage '{stage.name}': all parameters are frozen, so nothing would be trained")
    return [name for name in names if name in found]


def matching(names: list[str], pattern: str, stage: Stage) -> list[str]:
    """The names of parameters that match a pattern of a stage.

    Raises:
        GigamorphError: if there are none.
    """
    hits = [name for name in names if any(fnmatchcase(part, pattern) for part in _prefixes(name))]
    if not hits:
        there = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        raise GigamorphError(
            f"stage '{stage.name}': {pattern!r} matches no parameter of the network; its parts are {there}"
        )
    return hits


def require_multiple(stage: Stage, processes: int) -> None:
    """Refuse a stage whose batches per optimizer step cannot be distributed to the processes.

    Raises:
        GigamorphError: if accumulate is not a multiple of the number of processes.
    """
    if stage.accumulate % processes:
        size = f", {stage.batch_size} at a time," if stage.batch_size > 1 else ""
        raise GigamorphError(
            f"stage '{stage.name}': {stage.accumulate * stage.batch_size} images per optimizer step{size} cannot be "
            f"distributed to {processes} processes; make accumulate a multiple, or let them share each image"
        )


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Context that restores `requires_grad` of parameters and the probabilities of dropout layers on exit."""
    wants = [(p, p.requires_grad) for p in module.parameters()]
    drops = [(m, m.p) for m in module.modules() if isinstance(m, _DROPOUT)]
    try:
        yield
    finally:
        for parameter, flag in wants:
            parameter.requires_grad_(flag)
        for layer, p in drops:
            layer.p = p


def freeze(module: nn.Module, stage: Stage) -> None:
    """Make only the stage's parameters trainable, and set its dropout."""
    wanted = set(trainable_names(module, stage))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None
    if stage.dropout is not None:
        for layer in module.modules():
            if isinstance(layer, _DROPOUT):
                layer.p = stage.dropout


def train_mode(module: nn.Module, stage: Stage) -> None:
    """Set training mode, with BatchNorm according to the stage; call `freeze` first."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            own = [p.requires_grad for p in layer.parameters(recurse=False)]
            if stage.batch_norm == "eval" or (stage.batch_norm == "trainable" and own and not any(own)):
                layer.eval()
