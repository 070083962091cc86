"""Runs the steps of a network in order, segments as one function; or replays the captured step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..tiling.arena import in_arena
from ..tiling.scan import TileEvent
from .checkpoint import Checkpointed
from .forward import Forward, step_together
from .image_batch import ImageTensor
from .prepared import Prepared
from .untiled import run_untiled


def compute(forward: Forward) -> Any:
    """Run a forward: returns the outputs for one image batch, and applies the updates of buffers and arguments."""
    if forward.whole_image:
        run_untiled(forward)
        _note_one_tile(forward)
        return forward.finish()
    step = forward.prepared.whole_step(forward.device)
    step = step if step is not None and step.serves(forward) else None
    if step is not None:
        # Not the forward itself: it holds the image, and outputs whose graph would seem to wait for a backward.
        like = forward.prepared, forward.device, forward.dtype, step.retained
        found = step.result(forward, partial(_alone, *like))
        if found is not None:
            _note_one_tile(forward)
            return found[0]
        forward.alone = not step.failed
    run([forward])
    result = forward.finish()
    if step is not None:
        step.see(forward)
    return result


def _note_one_tile(forward: Forward) -> None:
    if forward.on_tile is not None:
        size = forward.pixels.shape
        forward.on_tile(TileEvent("forward", 1, 1, size[0] * size[-2] * size[-1]))


def _alone(
    prepared: Prepared,
    device: torch.device,
    dtype: torch.dtype,
    retained: bool,
    image: Tensor,
    state: Mapping[int, Tensor],
    targets: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """The results, by value number, of a forward on the given tensors, without captures or replays of its parts."""
    # Tensors that are written at the end may be read in the backward.
    kept = {v: t.clone() for v, t in state.items() if v in targets and v in prepared.kept_for_backward}
    given = prepared, image, ImageTensor(image), device, dtype, {**state, **kept}, None, {}, targets
    forward = Forward(*given, alone=True, retained=retained)
    run([forward])
    forward.finish()
    wanted = dict.fromkeys(prepared.staged.program.handed_out())
    return {v: forward.env[v] for v in wanted if v in forward.env}


def run(forwards: Sequence[Forward], first: int = 0, end: int | None = None) -> None:
    """Run the steps [first, end) of forwards that have the same steps, interleaved.

    Values that no later step reads are freed.
    """
    prepared = forwards[0].prepared
    shard = prepared.shard
    number, end = first, len(prepared.staged.steps) if end is None else end
    device = forwards[0].device
    same = contextlib.nullcontext() if shard is None else shard.same_random_numbers(device)
    for forward in forwards:
        forward.single = len(forwards) == 1
    with same, in_arena(device):
        while number < end:
            segment = prepared.segments.get(number)
            if segment is not None and torch.is_grad_enabled():
                Checkpointed.run(forwards, number)
                number = segment.steps.stop
            else:
                step_together(forwards, number)
                number += 1
