"""What a run will take, told before it: the largest image's plan, and how many optimizer steps there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..accelerate import Accelerated, accelerate
from ..errors import BudgetError
from ..tiling.memory import format_bytes
from .data import Data
from .mask_target import MaskTarget, WithLoss
from .options import TrainOptions

_LOOKED_AT = 16


def proposal(net: Accelerated, data: Data, options: TrainOptions) -> Iterator[str]:
    """Lines for people: tile, predicted peak and budget of a step on the largest image; steps of an epoch.

    Of the training images at most 16 are opened, spread over the table; larger ones may be among the others.

    Raises:
        BudgetError: if no tile of that image fits the budget; it names the image.
    """
    count = len(data.train)
    chosen = sorted({round(number) for number in np.linspace(0, count - 1, _LOOKED_AT)})
    looked = [_look(data.train[number]) for number in chosen]
    shape, path, _ = max(looked, key=lambda one: one[0][-2] * one[0][-1])
    samples = "images" if data.target.views is None else "exams"
    planned = net
    if isinstance(data.target, MaskTarget):  # the map is never whole in a step, as it would be in a call
        with_loss = WithLoss(net._network, len(data.target.names), options.loss)
        planned = accelerate(with_loss, options.memory_budget, batch_norm=options.batch_norm)
    planned.train()
    try:
        with torch.enable_grad():
            plan = planned.plan_for((1, *shape))
    except BudgetError as error:
        raise BudgetError(f"{path}: {error}") from error
    budget = "what is free" if options.memory_budget is None else format_bytes(options.memory_budget)
    rows, columns = plan.tiles
    tiles = "one tile" if rows * columns == 1 else f"{rows} x {columns} tiles of {plan.tile[0]} x {plan.tile[1]}"
    yield (
        f"largest of {sum(count for _, _, count in looked)} images looked at: {shape[-2]} x {shape[-1]}, {tiles}, "
        f"predicted peak {format_bytes(plan.peak_bytes)} of {budget}"
    )
    steps, epochs = -(-count // options.accumulate), sum(s.epochs for s in options.stages) or options.epochs
    yield (
        f"{min(options.accumulate, count)} {samples} per optimizer step (accumulate), {steps} steps per epoch, "
        f"{steps * epochs} in {epochs} epochs"
    )


def _look(item: Mapping[str, Any]) -> tuple[tuple[int, ...], Path, int]:
    """Shape of an image, or of the largest view of an exam; its file; how many views there are."""
    return tuple(item["image"].shape), item["record"].path, len(item.get("views", (1,)))
