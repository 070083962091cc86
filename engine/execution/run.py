"""The steps of a network in order, segments as one function."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from .checkpoint import Checkpointed
from .forward import Forward, step_together


def run(forwards: Sequence[Forward], first: int = 0, end: int | None = None) -> None:
    """The steps from `first` up to (without) `end` of forwards that have the same steps, side by side.

    Values that no later step reads are let go.
    """
    prepared = forwards[0].prepared
    shard = prepared.shard
    number, end = first, len(prepared.staged.steps) if end is None else end
    with contextlib.nullcontext() if shard is None else shard.same_random_numbers(forwards[0].device):
        while number < end:
            segment = prepared.segments.get(number)
            if segment is not None and torch.is_grad_enabled():
                Checkpointed.run(forwards, number)
                number = segment.steps.stop
            else:
                step_together(forwards, number)
                number += 1
