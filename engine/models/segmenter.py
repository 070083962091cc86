"""Checks, before any work, that a network outputs a map with one channel per class; runs on fake tensors."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import GigamorphError
from .classifier import record

_CONTRACT = "a network for masks must output one map with a logit per class and pixel (images, classes, rows, columns)"


def check_segmenter(
    model: nn.Module, name: str, shape: tuple[int, int, int, int], classes: int, device: torch.device | str = "cpu"
) -> None:
    """Refuse a network that does not output a map with `classes` channels.

    Raises:
        GigamorphError: names what it outputs instead; see also `classifier.record`.
    """
    program = record(model, name, shape, device)
    if not program.single:
        raise GigamorphError(f"model {name!r} outputs several tensors or a container of them; {_CONTRACT}")
    given = tuple(program.values[program.output[0].value].shape)
    if len(given) != 4 or given[:2] != (shape[0], classes) or (given[2:] == (1, 1) and shape[2:] != (1, 1)):
        size = " x ".join(map(str, given)) or "a single number"
        raise GigamorphError(f"model {name!r} outputs {size} for {shape[0]} image and {classes} classes; {_CONTRACT}")
