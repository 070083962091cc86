"""Time and memory of a step over sizes: peers run alternately, A B A B, so that other load affects all of them."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BudgetError, ForwardError, GigamorphError, UnsupportedError
from ..planning.plan import Plan
from ..planning.preview import plan
from . import check, roofline
from .front import LEAST, share_of
from .lightstream import norm_parameters, tile_within, tiles_to_try
from .ordinary import autocast
from .peers import PEERS, TRAINING, Settings
from .process import Child
from .results import EQUAL_MEMORY, FAILED, NOT_RUN, OK, OUT_OF_MEMORY, REFUSED, WRONG, BenchTask, StepRow
from .work import build

Say = Callable[[StepRow], None]
_EXACT_IMAGE, _EXACT_TILE = (160, 128), 64  # of the comparison in float64
_TILE_SHARE = 0.75  # of stock's bytes; with less, lightstream's work multiplies


@dataclass(frozen=True)
class StepOptions:
    """Options of a comparison.

    Attributes:
        peers: names, in the order in which they alternate.
        rounds: maximal number of timed rounds.
        box: maximal seconds of one peer's timed steps at a size. At least one step is timed, unless the untimed first
            step took longer than the box: then its time counts (except for peers that compile).
        cap: maximal bytes of a step, for all peers; None: free memory.
        budget: maximal bytes of gigamorph and lightstream's tile. None: what gigamorph's default tile needs, and for
            lightstream the best tile in 0.75 of stock's bytes.
        tile: gigamorph's tile in pixels; None: chosen by the plan.
        longest: maximal seconds of one step.
        folder: target of each peer's profile; None: no profiles.
    """

    peers: tuple[str, ...] = TRAINING
    rounds: int = 5
    box: float = 60.0
    cap: int | None = None
    budget: float | None = None
    tile: int | None = None
    longest: float = 600.0
    folder: Path | None = None


def measure(
    task: BenchTask,
    options: StepOptions,
    ceilings: dict[str, float],
    say: Say = lambda row: None,
    say_first: Say = lambda row: None,
) -> list[StepRow]:
    """Return one row per peer, and `EQUAL_MEMORY`. A peer's failure is stored in its row; the others continue.

    Args:
        say: called with each finished row.
        say_first: called with each row after its first step.
    """
    network = build(replace(task, device="cpu"))
    work = roofline.count(network, task)
    rows: list[StepRow] = []
    cells: list[tuple[StepRow, Child]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reference: tuple[str, Path] | None = None
        for name in (*options.peers, EQUAL_MEMORY):
            row = StepRow(
                task,
                name,
                cap_bytes=options.cap,
                flops=work.flops,
                roofline_seconds=work.seconds(ceilings, task.precision),
            )
            if name == EQUAL_MEMORY:
                row.cap_bytes = _equal_cap(rows)
                if row.cap_bytes is None:
                    continue
            rows.append(row)
            cell = _first_step(row, network, replace(options, budget=_budget(row, rows, network, options)), stack)
            if cell is None:
                say(row)
                continue
            cells.append((row, cell))
            say_first(row)
            path = folder / f"{name}.pt"
            if _store_status(row, cell.ask("save", path=str(path))) and reference is not None:
                _compare(row, network, path, *reference)
            elif row.status == OK:
                reference = name, path
        _run_alternately(cells, options)
        for row, cell in cells:
            if options.folder is not None and row.seconds:
                cell.ask("profile", folder=str(options.folder / f"{task} {row.peer}".replace(" ", "_")))
            say(row)
    return rows


def _budget(row: StepRow, rows: list[StepRow], network: nn.Module, options: StepOptions) -> float | None:
    """Return the budget of a row in bytes; of a front, a share of stock's peak or the least possible."""
    if row.base_peer != "gigamorph" or row.peer == "gigamorph":
        return options.budget
    if row.peer == LEAST:
        try:
            return planned(network, row.task, 1).peak_bytes
        except BudgetError as error:
            return error.needed_bytes
        except (UnsupportedError, ForwardError):
            return None  # its first step says why
    stock = next((other.peak_bytes for other in rows if other.peer == "stock"), None)
    return share_of(row.peer) * (stock or planned(network, row.task, None).stock_bytes or 0)


def _equal_cap(rows: list[StepRow]) -> int | None:
    """Return the bytes that gigamorph took, if lightstream was run as well."""
    run = {row.peer: row for row in rows if row.status != NOT_RUN}
    ours = run.get("gigamorph")
    return ours.peak_bytes if ours is not None and ours.status in (OK, WRONG) and "lightstream" in run else None


def exactness(task: BenchTask) -> list[StepRow]:
    """Compare stock and gigamorph in float64 on a small image in small tiles, to show the exactness of a step."""
    options = StepOptions(("stock", "gigamorph"), rounds=1, box=0, tile=_EXACT_TILE)
    small = replace(task, image=(1, task.image[1], *_EXACT_IMAGE), precision="fp64", device="cpu")
    try:
        return measure(small, options, {})
    except GigamorphError:  # most ViTs accept only one image size
        return measure(replace(small, image=task.image), options, {})


def _first_step(row: StepRow, network: nn.Module, options: StepOptions, stack: contextlib.ExitStack) -> Child | None:
    """Start a process and run its first step; return None, with the row's status set, on failure."""
    why = PEERS[row.base_peer].missing(row.task)
    if why is not None:
        row.status, row.reason = NOT_RUN, why
        return None
    try:
        choices = settings(row.peer, row.task, network, replace(options, cap=row.cap_bytes))
    except (BudgetError, UnsupportedError, ForwardError) as error:
        row.status = OUT_OF_MEMORY if isinstance(error, BudgetError) else REFUSED
        row.reason = str(error)
        return None
    known = _predict(row, network, choices[0])
    for chosen in choices:
        row.settings = {**chosen, **known}
        cell = Child(options.longest)
        if _store_status(row, started := cell.start(row.task, row.base_peer, chosen, row.cap_bytes)):
            answer = cell.run(1)
            if _store_status(row, answer):
                row.first_seconds = started["prepare_seconds"] + answer["seconds"][0]
                if answer["seconds"][0] > options.box > 0 and not PEERS[row.base_peer].compiles:
                    _add_times(row, answer)
                _update_peaks(row, answer)
                if row.status == OK:
                    return stack.enter_context(cell)
        cell.__exit__()
        if row.status not in (REFUSED, FAILED):
            break
    return None


def settings(peer: str, task: BenchTask, network: nn.Module, options: StepOptions) -> list[Settings]:
    """Return candidate settings of a peer; the first that works is used."""
    budget = options.budget
    if peer == EQUAL_MEMORY:
        assert options.cap is not None
        return [{"tile": tile_within(network, task, options.cap)}]
    base, _, variant = peer.partition(", ")
    if base == "gigamorph":
        return [{"memory_budget": None if budget is None else int(budget), "tile": options.tile}]
    if variant.endswith("of activations"):
        return [{"activations": share_of(peer)}]
    if peer == "lightstream":
        if budget is None:
            stock = planned(network, task, None, options.tile).stock_bytes
            assert stock is not None
            budget = _TILE_SHARE * stock
        return [{"tile": tile} for tile in tiles_to_try(network, task, int(min(budget, options.cap or budget)))]
    return [{}]


@functools.lru_cache(maxsize=4)
def planned(
    network: nn.Module, task: BenchTask, budget: int | None, tile: int | None = None, halos: str = "auto"
) -> Plan:
    """Return the plan of a task; see `plan`."""
    dtype = torch.float64 if task.precision == "fp64" else torch.float32
    with autocast(task):
        return plan(
            network, task.image, budget, tile=tile, dtype=dtype, device=task.device, training=task.training, halos=halos
        )


def _predict(row: StepRow, network: nn.Module, given: Settings) -> Settings:
    """Store the predicted peak in the row, if the network has a plan; return the plan's choices."""
    if row.peer != "stock" and row.base_peer != "gigamorph":
        return {}
    with contextlib.suppress(BudgetError, UnsupportedError):
        made = planned(network, row.task, given.get("memory_budget"), given.get("tile"))
        row.predicted_bytes = made.stock_bytes if row.peer == "stock" else made.peak_bytes
        if row.peer != "stock":
            return {"tile": list(made.tile), "retained": made.retained, "carries": made.halos}
    return {}


def _store_status(row: StepRow, answer: dict[str, Any]) -> bool:
    """Store the status of an answer in the row; return whether it is ok."""
    row.status, row.reason = answer["status"], answer.get("reason")
    return row.status == OK


def _add_times(row: StepRow, answer: dict[str, Any]) -> None:
    row.seconds += answer["seconds"]
    row.cpu_seconds += answer["cpu_seconds"]


def _update_peaks(row: StepRow, answer: dict[str, Any]) -> None:
    """Update the row's peaks, which grow from round to round; above the cap, the row is out of memory."""
    row.peak_bytes = max(row.peak_bytes or 0, answer["peak_bytes"])
    row.process_bytes, row.nvml_bytes = answer["process_bytes"], answer["nvml_bytes"]
    if row.cap_bytes is not None and row.peak_bytes > row.cap_bytes:
        row.status, row.reason = OUT_OF_MEMORY, f"its peak of {row.peak_bytes / 1e9:.2f} GB exceeds the cap"


def _compare(row: StepRow, network: nn.Module, path: Path, against: str, reference: Path) -> None:
    found, expected = torch.load(path), torch.load(reference)
    untrained = frozenset(norm_parameters(network)) if row.base_peer == "lightstream" else frozenset()
    row.check = check.compare(found, expected, against, untrained)
    wrong = check.complaint(row.check, "bf16" if row.peer == "bf16" else row.task.precision)
    if wrong is not None:
        row.status, row.reason = WRONG, wrong


def _run_alternately(cells: list[tuple[StepRow, Child]], options: StepOptions) -> None:
    """Run timed steps alternately, until each peer's rounds or box are used up."""
    warm = 1 if any(row.task.device == "cuda" for row, _ in cells) else 0  # memory was freed after the last round
    for _ in range(options.rounds):
        for row, cell in cells:
            if row.status not in (OK, WRONG) or (row.seconds and sum(row.seconds) + row.seconds[-1] > options.box):
                continue
            verdict = row.status, row.reason
            if _store_status(row, answer := cell.run(1, warm)):
                row.status, row.reason = verdict
                _add_times(row, answer)
                _update_peaks(row, answer)
