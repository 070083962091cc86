"""A preview of a run: the plan of the largest image, and the number of optimizer steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
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

_SAMPLED_IMAGES = 16
_QUICK_PLAN = 1.0
"""Maximum seconds of a plan after which a second plan, with a larger budget, is made."""
_MIN_SPEEDUP = 1.1
"""Minimum speed-up of a step for which a larger budget is suggested."""


def preview_lines(net: Accelerated, data: Data, options: TrainOptions) -> Iterator[str]:
    """Lines to print: tile, predicted peak and budget of a step on the largest image; steps of an epoch; and a larger
    budget that makes steps faster, if there is one and planning is quick.

    At most 16 training images, spread over the table, are opened; others may be larger.

    Args:
        net: the network.
        data: the images.
        options: of the run.

    Raises:
        BudgetError: naming the image, if none of its tiles fits the budget.
    """
    count = len(data.train)
    chosen = sorted({round(number) for number in np.linspace(0, count - 1, _SAMPLED_IMAGES)})
    looked = [_image_size(data.train[number]) for number in chosen]
    shape, path, _ = max(looked, key=lambda one: one[0][-2] * one[0][-1])
    samples = "images" if data.target.views is None else "exams"
    planned = net
    if isinstance(data.target, MaskTarget):  # a step does not compute the complete map, as a call would
        with_loss = WithLoss(net._network, len(data.target.names), options.loss)
        planned = accelerate(with_loss, options.budget, batch_norm=options.batch_norm)
    planned.train()
    started = time.monotonic()
    try:
        with torch.enable_grad():
            plan = replace(planned.plan_for((1, *shape)), untiled_bytes=0)  # images are read by region
    except BudgetError as error:
        raise BudgetError(f"{path}: {error}", error.needed_bytes) from error
    quick = time.monotonic() - started < _QUICK_PLAN
    log.debug("plan of the largest image\n%s", plan)
    budget = "what is free" if options.budget is None else format_bytes(options.budget)
    rows, columns = plan.tiles
    tiles = "one tile" if rows * columns == 1 else f"{rows} x {columns} tiles of {plan.tile[0]} x {plan.tile[1]}"
    yield (
        f"largest of {sum(count for _, _, count in looked)} sampled images: {shape[-2]} x {shape[-1]}, {tiles}, "
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
    """A line on a budget, at most four times the present one or the free memory, with which a step recomputes less."""
    device, budget = planned._device(), planned.memory_budget
    free = int(constants.FREE_SHARE * available_bytes(device))
    most = free if budget is None else min(4 * budget, free)
    # Without a budget, a GPU already uses all free memory.
    if plan.work < _MIN_SPEEDUP or most <= (budget or 0) or (budget is None and device.type != "cpu"):
        return
    dtype = next((p.dtype for p in planned.parameters() if p.is_floating_point()), torch.float32)
    with torch.enable_grad():
        other = _with_budget(planned, most).plan_for(shape, dtype, device)
    faster = plan.work / other.work
    if faster >= _MIN_SPEEDUP:
        enough = min(most, math.ceil(1.1 * other.peak_bytes / 2**20) * 2**20)
        yield (
            f"--memory-budget {enough // 2**20}MiB would make a step about {faster:.1f} x faster, estimated from "
            "arithmetic and moved bytes; gigamorph plan compares budgets"
        )


def _with_budget(net: Accelerated, memory_budget: int) -> Accelerated:
    """The network, accelerated with the same settings and another budget."""
    return accelerate(net._network, memory_budget, net.tile, net.batch_norm, net.halos, net.fallback, net.split)


def _image_size(item: Mapping[str, Any]) -> tuple[tuple[int, ...], Path, int]:
    """Shape of an image, or of the largest view of an exam; its file; the number of views."""
    return tuple(item["image"].shape), item["record"].path, len(item.get("views", (1,)))
