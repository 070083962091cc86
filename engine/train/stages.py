"""Stages of training: which parameters learn, at which rate, and what the layers around them do meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from ..errors import GigamorphError

_NORM = nn.modules.batchnorm._BatchNorm
_DROPOUT = nn.modules.dropout._DropoutNd


@dataclass(frozen=True)
class Stage:
    """One stage. An optimizer is made anew for each; patterns are matched against names with `fnmatch`."""

    name: str
    epochs: int
    lr: float
    trainable: tuple[str, ...] = ("*",)
    """Patterns of parameters, or of modules, all of whose parameters are meant; all others are frozen."""
    frozen: tuple[str, ...] = ()
    """Patterns of those that are frozen nevertheless."""
    rates: tuple[tuple[str, float], ...] = ()
    """Patterns of parameters with a learning rate of their own in the place of ``lr``; the last that fits counts."""
    weight_decay: float = 0.0
    """On weights, not on biases and norms. With "adam" and "sgd" it is a gradient, with "adamw" a decay of its own."""
    undecayed: tuple[str, ...] = ()
    """Patterns of parameters that learn without decay."""
    optimizer: str = "adam"
    """A class of `torch.optim`, in letters of any case, or ``timm:NAME``."""
    momentum: float = 0.9
    """Of "sgd", Nesterov's where it is not zero."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, as betas."""
    layer_decay: float = 1.0
    """The last part of the network (a block of layers, `parts`) learns at ``lr``, each one before it at so much of the
    rate of the one after."""
    batch_size: int = 1
    accumulate: int = 1
    """Batches per optimizer step, whose losses are averaged."""
    schedule: str = "constant"
    """"constant"; "cosine" and "linear", which fall to zero; or another, see `schedules.factor_of`."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule."""
    warmup: float | None = None
    """Share of the stage's steps over which the rate rises; None: a tenth, of "constant" none."""
    plateau: int | None = None
    """The rate is divided by ten after this many epochs without a better score."""
    patience: int | None = None
    """The stage ends after this many epochs without a better score."""
    dropout: float | None = None
    """Probability of every dropout layer; None leaves each as it was built."""
    batch_norm: Literal["train", "eval", "trainable"] = "train"
    """"eval": all use and keep their stored statistics; "trainable": only those whose weights are frozen do."""
    clip: float | None = None
    """Largest norm of the gradients of a step."""
    average: float | None = None
    """Decay of an exponential moving average of the weights, which then is what is scored and kept as the best."""


def trainable_names(module: nn.Module, stage: Stage) -> list[str]:
    """Names of the parameters that a stage trains, in the module's order.

    Raises:
        GigamorphError: if a pattern names no parameter, or none is left.
    """
    names = [name for name, _ in module.named_parameters()]
    found = {name for pattern in stage.trainable for name in matching(names, pattern, stage)}
    found -= {name for pattern in stage.frozen for name in matching(names, pattern, stage)}
    if not found:
        raise GigamorphError(f"stage '{stage.name}': all parameters are frozen; nothing would be trained")
    return [name for name in names if name in found]


def matching(names: list[str], pattern: str, stage: Stage) -> list[str]:
    """The parameters, of those named, that a pattern of a stage means.

    Raises:
        GigamorphError: if it means none.
    """
    hits = [name for name in names if any(fnmatchcase(part, pattern) for part in _prefixes(name))]
    if not hits:
        there = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        raise GigamorphError(
            f"stage '{stage.name}': {pattern!r} names no parameter of the network, whose parts are {there}"
        )
    return hits


def require_deal(stage: Stage, processes: int) -> None:
    """Refuse a stage whose batches of an optimizer step cannot be dealt to so many processes.

    Raises:
        GigamorphError: accumulate is no multiple of them.
    """
    if stage.accumulate % processes:
        size = f", {stage.batch_size} at a time," if stage.batch_size > 1 else ""
        raise GigamorphError(
            f"stage '{stage.name}': {stage.accumulate * stage.batch_size} images per optimizer step{size} cannot be "
            f"dealt to {processes} processes; make accumulate a multiple, or let them share each image"
        )


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """On the way out, parameters learn or not, and dropout layers drop, as they did before."""
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
    """Let the stage's parameters learn and no others, and set its dropout."""
    wanted = set(trainable_names(module, stage))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None
    if stage.dropout is not None:
        for layer in module.modules():
            if isinstance(layer, _DROPOUT):
                layer.p = stage.dropout


def train_mode(module: nn.Module, stage: Stage) -> None:
    """Training mode, with BatchNorm as the stage wants it; call `freeze` first."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, _NORM):
            own = [p.requires_grad for p in layer.parameters(recurse=False)]
            if stage.batch_norm == "eval" or (stage.batch_norm == "trainable" and own and not any(own)):
                layer.eval()
