"""Whether a network gives a map with a channel for each class: asked before any work, on fake tensors."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import GigamorphError
from .classifier import record

_WANTED = "a network for masks gives one map, a logit for each class and place (images, classes, rows, columns)"


def check_segmenter(
    model: nn.Module, name: str, shape: tuple[int, int, int, int], classes: int, device: torch.device | str = "cpu"
) -> None:
    """Refuse a network that does not give a map with `classes` channels.

    Raises:
        GigamorphError: with what it gives instead; see also `classifier.record`.
    """
    program = record(model, name, shape, device)
    if not program.single:
        raise GigamorphError(f"model {name!r} gives several tensors or a container of them; {_WANTED}")
    given = tuple(program.values[program.output[0].value].shape)
    if len(given) != 4 or given[:2] != (shape[0], classes) or (given[2:] == (1, 1) and shape[2:] != (1, 1)):
        told = " x ".join(map(str, given)) or "a single number"
        raise GigamorphError(f"model {name!r} gives {told} for {shape[0]} image and {classes} classes; {_WANTED}")
