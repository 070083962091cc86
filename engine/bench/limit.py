"""How large an image can be: the largest square that a peer trains, or predicts, under a cap; by bisection.

Each size is tried in a process of its own, whose peak tells whether it kept to the cap; on the CPU it gives freed
memory back at once, so that the peak is what is needed, not what the C library keeps. The search begins at what `plan`
predicts, so that it takes few tries, and ends within 3 % of the side, 6 % of the pixels. gigamorph keeps its halos in
memory on the CPU: with those on disk an image may be larger still, and takes hours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from ..errors import BudgetError, UnsupportedError
from .child import measure_alone
from .peers import PEERS
from .results import FAILED, NOT_RUN, OK, OUT_OF_MEMORY, REFUSED, LimitRow, Task, Try
from .step import Options, planned, settings
from .work import build

_GRID = 32  # pixels: sides that are tried
_CLOSE = 1.03
_FINE = 0.01  # of the side: how closely a prediction is sought
_GUESS = 1024  # where there is no prediction
_LARGEST = 2**20


@dataclass(frozen=True)
class Search:
    """How a limit is sought.

    Attributes:
        cap: bytes that parameters and a step may take.
        share: of the cap, given to gigamorph as its budget: a prediction is not exact.
        steps: run at each size; the heap of a CPU grows until the second or third.
        longest: seconds that one try may take; what takes longer is not known to fit.
    """

    cap: int
    share: float = 0.9
    steps: int = 2
    longest: float = 120.0


def find(task: Task, peer: str, search: Search, say: Callable[[Try], None] = lambda found: None) -> LimitRow:
    """The largest side that fits, for one peer. The image size of `task` is left out of account."""
    row = LimitRow(task, peer, search.cap)
    why = PEERS[peer].missing(task)
    if why is not None:
        row.status, row.reason = NOT_RUN, why
        return row
    network = build(replace(task, device="cpu"))
    try:
        row.predicted_side = predicted_side(network, task, peer, search)
        _bisect(row, network, search, say)
    except UnsupportedError as error:
        row.status, row.reason = REFUSED, str(error)
    if row.side:
        row.task = _sized(task, row.side)
    elif row.status == OK:
        last = row.tries[-1]
        row.status, row.reason = last.status, last.reason
    return row


def predicted_side(network: nn.Module, task: Task, peer: str, search: Search) -> int | None:
    """The largest side on the grid that fits by `plan`; None for peers that it does not know."""
    if peer not in ("stock", "gigamorph"):
        return None

    def fits(side: int) -> bool:
        budget = int(search.share * search.cap) if peer == "gigamorph" else None
        try:
            made = planned(network, _sized(task, side), budget, halos=_halos(task))
        except BudgetError:
            return False
        return peer == "gigamorph" or (made.stock_bytes or 0) <= search.cap

    return _largest(fits, _GUESS)


def _largest(fits: Callable[[int], bool], guess: int) -> int | None:
    """The largest side on the grid that fits, where larger ones fit less."""
    low, high = 0, guess
    while high <= _LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > max(_GRID, _FINE * low):
        middle = (low + high) // 2 // _GRID * _GRID
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def _bisect(row: LimitRow, network: nn.Module, search: Search, say: Callable[[Try], None]) -> None:
    """Widens from the guess until one size fits and one does not, then halves between them."""
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
            side = _grid((low + high) / 2)
        else:
            side = _grid(side * factor) if low else _grid(side / factor)
            side = max(side, low + _GRID) if low else min(side, high - _GRID)
            factor = min(2.0, factor**2)
        if not 0 < side <= _LARGEST or side in (low, high):
            break
    row.side, row.too_large = low or None, high or None


def _try(row: LimitRow, network: nn.Module, side: int, search: Search) -> Try:
    task = _sized(row.task, side)
    options = Options(cap=search.cap, budget=int(search.share * search.cap), longest=search.longest)
    for chosen in settings(row.peer, task, network, options):
        row.settings = {**chosen, "halos": _halos(task)} if row.peer == "gigamorph" else chosen
        answer = measure_alone(
            task, row.peer, row.settings, search.steps, cap=search.cap, longest=search.longest, lean=True
        )
        if answer["status"] not in (REFUSED, FAILED):
            break
    if answer["status"] != OK:
        return Try(side, answer["status"], reason=answer["reason"])
    peak = answer["peak_bytes"]
    status = OK if peak <= search.cap else OUT_OF_MEMORY
    return Try(side, status, peak, min(answer["seconds"]))


def _halos(task: Task) -> str:
    return "device" if task.device == "cpu" else "auto"


def _grid(side: float) -> int:
    return round(side / _GRID) * _GRID


def _sized(task: Task, side: int) -> Task:
    return replace(task, image=(*task.image[:2], side, side))
