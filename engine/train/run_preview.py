"""What a run will take, told before it: the largest image's plan, and how many optimizer steps there are."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..accelerate import Accelerated, accelerate
from ..errors import BudgetError
from ..planning import constants
from ..planning.plan import Plan
from ..tiling.memory import available_bytes, format_bytes
from .data import Data
from .mask_target import MaskTarget, WithLoss
from .options import TrainOptions

log = logging.getLogger("gigamorph")

_LOOKED_AT = 16
_PATIENCE = 1.0
"""Seconds that a plan may have taken for another one, of a larger budget, to be made as well."""
_TOLD_FROM = 1.1
"""By how much a step has to become faster for a larger budget to be told."""


def proposal(net: Accelerated, data: Data, options: TrainOptions) -> Iterator[str]:
    """Lines for people: tile, predicted peak and budget of a step on the largest image; steps of an epoch; a budget by
    which a step would be faster, if there is one and planning is quick.

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
        planned = accelerate(with_loss, options.budget, batch_norm=options.batch_norm)
    planned.train()
    started = time.monotonic()
    try:
        with torch.enable_grad():
            plan = planned.plan_for((1, *shape))
    except BudgetError as error:
        raise BudgetError(f"{path}: {error}") from error
    quick = time.monotonic() - started < _PATIENCE
    log.debug("plan of the largest image\n%s", plan)
    budget = "what is free" if options.budget is None else format_bytes(options.budget)
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
    if quick and not options.split_image:
        yield from larger_budget(planned, (1, *shape), plan)


def larger_budget(planned: Accelerated, shape: tuple[int, ...], plan: Plan) -> Iterator[str]:
    """A line on a budget of at most four times the bytes, or of what is free, by which a step computes less twice."""
    device, budget = planned._device(), planned.memory_budget
    free = int(constants.FREE_SHARE * available_bytes(device))
    most = free if budget is None else min(4 * budget, free)
    # Without a budget a GPU fills what is free already.
    if plan.work < _TOLD_FROM or most <= (budget or 0) or (budget is None and device.type != "cpu"):
        return
    dtype = next((p.dtype for p in planned.parameters() if p.is_floating_point()), torch.float32)
    with torch.enable_grad():
        other = _with_budget(planned, most).plan_for(shape, dtype, device)
    faster = plan.work / other.work
    if faster >= _TOLD_FROM:
        enough = min(most, math.ceil(1.1 * other.peak_bytes / 2**20) * 2**20)
        yield (
            f"--memory-budget {enough // 2**20}MiB would make a step about {faster:.1f} x faster, by its arithmetic "
            "and moved bytes; gigamorph plan compares budgets"
        )


def _with_budget(net: Accelerated, memory_budget: int) -> Accelerated:
    """The same network, accelerated in the same way within another budget."""
    return accelerate(net._network, memory_budget, net.tile, net.batch_norm, net.halos, net.fallback, net.split)


def _look(item: Mapping[str, Any]) -> tuple[tuple[int, ...], Path, int]:
    """Shape of an image, or of the largest view of an exam; its file; how many views there are."""
    return tuple(item["image"].shape), item["record"].path, len(item.get("views", (1,)))
