"""Largest square image that a peer can train on, or predict, under a cap; by bisection.

Each size runs in a separate process, whose peak shows whether it kept the cap. On the CPU that process returns freed
memory at once, so that the peak is the memory needed, not what the C library caches. The search starts at the
prediction of `plan`, so that it needs few tries, and ends within 3 % of the side, 6 % of the pixels. gigamorph keeps
its halos in memory on the CPU; with halos on disk, larger images are possible but take hours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from ..errors import BudgetError, ForwardError, UnsupportedError
from .peers import PEERS
from .process import measure_in_new_process
from .results import FAILED, NOT_RUN, OK, OUT_OF_MEMORY, REFUSED, BenchTask, LimitRow, Try
from .step import StepOptions, planned, settings
from .work import build

_GRID = 32  # pixels between candidate sides
_CLOSE = 1.03  # final ratio of the sides that fail and fit
_FINE = 0.01  # tolerance of a prediction, relative to the side
_GUESS = 1024  # first side without a prediction
_LARGEST = 2**20


@dataclass(frozen=True)
class Search:
    """Parameters of the search for a limit.

    Attributes:
        cap: maximal bytes of parameters and a step.
        share: gigamorph's budget as a share of the cap, because predictions are not exact.
        steps: steps at each size; the heap of a CPU grows until the second or third.
        longest: maximal seconds of one try; a longer one counts as not run.
    """

    cap: int
    share: float = 0.9
    steps: int = 2
    longest: float = 120.0


def find(task: BenchTask, peer: str, search: Search, say: Callable[[Try], None] = lambda found: None) -> LimitRow:
    """Find the largest side that fits for one peer. The image size of `task` is ignored."""
    row = LimitRow(task, peer, search.cap)
    why = PEERS[peer].missing(task)
    if why is not None:
        row.status, row.reason = NOT_RUN, why
        return row
    network = build(replace(task, device="cpu"))
    try:
        row.predicted_side = predicted_side(network, task, peer, search)
        _bisect(row, network, search, say)
    except (UnsupportedError, ForwardError) as error:
        row.status, row.reason = REFUSED, str(error)
    if row.side:
        row.task = _with_side(task, row.side)
    elif row.status == OK:
        last = row.tries[-1]
        row.status, row.reason = last.status, last.reason
    return row


def predicted_side(network: nn.Module, task: BenchTask, peer: str, search: Search) -> int | None:
    """Return the largest side on the grid that fits according to `plan`; None for peers without a plan."""
    if peer not in ("stock", "gigamorph"):
        return None

    def fits(side: int) -> bool:
        budget = int(search.share * search.cap) if peer == "gigamorph" else None
        try:
            made = planned(network, _with_side(task, side), budget, halos=_halos(task))
        except BudgetError:
            return False
        return peer == "gigamorph" or (made.stock_bytes or 0) <= search.cap

    return _largest_fitting(fits, _GUESS)


def _largest_fitting(fits: Callable[[int], bool], guess: int) -> int | None:
    """Return the largest side on the grid that fits, if `fits` is monotone."""
    low, high = 0, guess
    while high <= _LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > max(_GRID, _FINE * low):
        middle = (low + high) // 2 // _GRID * _GRID
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def _bisect(row: LimitRow, network: nn.Module, search: Search, say: Callable[[Try], None]) -> None:
    """Expand from the guess until one size fits and one does not, then bisect."""
    low, high = 0, 0
    side, factor = row.predicted_side or _GUESS, _CLOSE if row.predicted_side else 2.0
    while True:
        found = _try(row, network, side, search)
        row.tries.append(found)
        say(found)
        if found.status == NOT_RUN:
            row.reason = f"{side} x {side}: {found.reason}"
        if found.status == OK:
            low = max(low, side)
        elif found.status in (OUT_OF_MEMORY, NOT_RUN):
            high = min(high or side, side)
        else:
            row.status, row.reason = found.status, found.reason
            break
        if low and high:
            if high <= max(_CLOSE * low, low + _GRID):
                break
            side = _round_to_grid((low + high) / 2)
        else:
            side = _round_to_grid(side * factor) if low else _round_to_grid(side / factor)
            side = max(side, low + _GRID) if low else min(side, high - _GRID)
            factor = min(2.0, factor**2)
        if not 0 < side <= _LARGEST or side in (low, high):
            break
    row.side, row.too_large = low or None, high or None


def _try(row: LimitRow, network: nn.Module, side: int, search: Search) -> Try:
    task = _with_side(row.task, side)
    options = StepOptions(cap=search.cap, budget=int(search.share * search.cap), longest=search.longest)
    for chosen in settings(row.peer, task, network, options):
        row.settings = {**chosen, "halos": _halos(task)} if row.peer == "gigamorph" else chosen
        answer = measure_in_new_process(
            task, row.peer, row.settings, search.steps, cap=search.cap, longest=search.longest, lean=True
        )
        if answer["status"] not in (REFUSED, FAILED):
            break
    if answer["status"] != OK:
        return Try(side, answer["status"], reason=answer["reason"])
    peak = answer["peak_bytes"]
    status = OK if peak <= search.cap else OUT_OF_MEMORY
    return Try(side, status, peak, min(answer["seconds"]))


def _halos(task: BenchTask) -> str:
    return "device" if task.device == "cpu" else "auto"


def _round_to_grid(side: float) -> int:
    return round(side / _GRID) * _GRID


def _with_side(task: BenchTask, side: int) -> BenchTask:
    return replace(task, image=(*task.image[:2], side, side))
