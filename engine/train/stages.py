"""Stages of training: trainable parameters, learning rates, and the modes of BatchNorm and dropout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from ..errors import GigamorphError
from ..torch_private import BatchNorm
from .options import Stage

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


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
