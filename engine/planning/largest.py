"""The largest image, or batch, of a step that keeps all maps and halos on its device."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from .plan import Plan
from .search import PlanSearch

log = logging.getLogger("gigamorph")
_STEP = 64
"""Sides of an image are multiples of this many pixels."""
_SHARE = 32
"""The number of steps of a side, or of images, is at most this fraction of itself too small."""
_SHARES = (1.0, 0.75, 0.5)
"""Shares of the budget that are tried: with less memory, a plan may have smaller tiles and less work."""
_MOST = 1 << 12
"""Largest number of steps of a side, or of images: without stored halos, as in inference, memory need not grow."""
MOST_WORK = 2.0
"""Largest work of a plan, in that of stock PyTorch: larger images take far more recomputation."""


def largest(
    search: Callable[[tuple[int, int, int, int]], AbstractContextManager[PlanSearch]],
    shape: tuple[int, int, int, int],
    budgets: Sequence[int],
    what: str,
) -> list[Plan | None]:
    """For each budget, the plan of the largest step; None if not even a small one fits.

    Its work is at most `MOST_WORK`. With more, or with maps or halos in host memory or in files, an image may be
    larger, but its step takes several times as long.

    Args:
        search: makes the context with the search for plans of steps of a shape.
        shape: (N, C, H, W); "size" keeps N and about H / W, "batch" keeps H and W.
        budgets: bytes of the device that a step may use, in ascending order.
        what: "size" or "batch".

    Returns:
        Plans of steps that are at most 3 % too small on a side, or in their number of images, with the memory of the
        same step in stock PyTorch.
    """
    n, c, height, width = shape
    made: dict[tuple[int, int], Plan | None] = {}

    def fits(count: int, budget: int) -> bool:
        if (count, budget) not in made:
            side = count * _STEP, max(1, round(count * width / height)) * _STEP
            asked = (count, c, height, width) if what == "batch" else (n, c, *side)
            with search(asked) as here:
                plans = (plan for share in _SHARES if (plan := here.plan_or_none(int(share * budget))))
                kept = (plan for plan in plans if plan.maps == plan.halos == "device" and plan.work <= MOST_WORK)
                best = next(kept, None)
                made[count, budget] = best and replace(
                    best, stock_bytes=here.stock_bytes, folded_bytes=here.folded_bytes
                )
        return made[count, budget] is not None

    found: list[Plan | None] = []
    low, power = 1 if what == "batch" else 8, 1.0 if what == "batch" else 0.5
    for number, budget in enumerate(budgets):
        # Memory is about proportional to the pixels, so the last result predicts the next one.
        growth = 1.2**power if number and found[-1] else 2.0
        low, high = min(_MOST, round(low * (budget / budgets[number - 1]) ** power)) if growth < 2 else low, 0
        while low and not fits(low, budget):
            low, high = int(low / growth), low
        while low and not high and low < _MOST:
            above = min(_MOST, max(low + 1, math.ceil(low * growth)))
            low, high = (above, 0) if fits(above, budget) else (low, above)
        while high - low > max(1, low // _SHARE):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, budget) else (low, middle)
        found.append(made[low, budget] if low else None)
        if low == _MOST:
            log.warning("the search ended at %s times its smallest %s; a larger one fits", _MOST, what)
        low = low or 1
    return found
