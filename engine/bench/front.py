"""Time against memory of one step: all ways of stock PyTorch, and gigamorph without a budget and with several.

At each amount of memory that a way of stock PyTorch needs, gigamorph's fastest step within that memory is compared with
the fastest way within it. Only steps whose results are right count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ..report.figure import panel
from .peers import PEERS
from .results import OK, BenchTask, StepRow

SHARES = (0.8, 0.5, 0.33, 0.2)
"""gigamorph's budgets, as shares of eager stock's peak."""
ACTIVATIONS = (0.8, 0.5, 0.2, 0.0)
"""Shares of activations that a compiled forward of stock PyTorch may store."""
LEAST = "gigamorph, least memory"
_STOCK = (
    *("stock", "channels-last", "folded", "folded-channels-last", "compile", "folded-compile", "autotune"),
    *("checkpoint", "folded-checkpoint", "lightstream"),
)
_OURS_COLOUR, _STOCK_COLOUR = "#1f618d", "#c0392b"


def ways(task: BenchTask) -> tuple[str, ...]:
    """The rows of a front, in the order in which they are first run: stock first, since budgets are shares of its peak.

    Args:
        task: ways that do not apply to it are left out.
    """
    stock = [name for name in _STOCK if PEERS[name].missing(task) is None]
    compiled = next((name for name in ("folded-compile", "compile") if name in stock), None)
    limited = [f"{compiled}, {share:g} of activations" for share in ACTIVATIONS if compiled and task.training]
    return (*stock, *limited, "gigamorph", *(f"gigamorph, {share:g} of stock" for share in SHARES), LEAST)


def share_of(way: str) -> float:
    """The number in the name of a way."""
    return float(way.partition(", ")[2].partition(" ")[0])


def is_ours(row: StepRow) -> bool:
    return row.base_peer == "gigamorph"


def fastest_by_memory(rows: Sequence[StepRow]) -> list[StepRow]:
    """The rows that no other row beats in both memory and time, by memory."""
    front: list[StepRow] = []
    right = [row for row in rows if row.status == OK and row.peak_bytes and row.median_seconds]
    for row in sorted(right, key=lambda row: (row.peak_bytes, row.median_seconds)):
        if not front or (row.median_seconds or 0) < (front[-1].median_seconds or 0):
            front.append(row)
    return front


@dataclass(frozen=True)
class Comparison:
    """gigamorph and the best way of stock PyTorch within some memory.

    Attributes:
        memory: bytes.
        stock: the fastest way of stock PyTorch within `memory`; eager stock if none needs so little.
        ours: gigamorph's fastest step within `memory`; None if it needs more.
        reached: whether a way of stock PyTorch needs so little.
    """

    memory: int
    stock: StepRow
    ours: StepRow | None
    reached: bool = True

    @property
    def ratio(self) -> float | None:
        """gigamorph's time over stock's."""
        if self.ours is None or not self.ours.median_seconds or not self.stock.median_seconds:
            return None
        return self.ours.median_seconds / self.stock.median_seconds

    def __str__(self) -> str:
        name = f"best way of stock: {self.stock.peer}" if self.reached else "no way of stock; eager stock"
        ours = "gigamorph needs more" if self.ours is None else f"{self.ours.peer} {self.ours.median_seconds:.2f} s"
        ratio = "" if self.ratio is None else f": {self.ratio:.2f} times its time"
        return f"{self.memory / 1e9:6.2f} GB  {name} {self.stock.median_seconds:.2f} s, {ours}{ratio}"


def comparisons(rows: Sequence[StepRow]) -> list[Comparison]:
    """Compare at the memory of each step of stock's front, and at that of gigamorph's steps that need less than all.

    Args:
        rows: of one task.
    """
    stock = fastest_by_memory([row for row in rows if not is_ours(row)])
    ours = fastest_by_memory([row for row in rows if is_ours(row)])
    eager = next((row for row in rows if row.peer == "stock" and row.median_seconds), None)
    found = []
    for way in stock:
        memory = way.peak_bytes or 0
        within = [row for row in ours if (row.peak_bytes or 0) <= memory]
        found.append(Comparison(memory, way, within[-1] if within else None))
    least = min((row.peak_bytes or 0 for row in stock), default=0)
    below = [row for row in ours if (row.peak_bytes or 0) < least]
    return [Comparison(row.peak_bytes or 0, eager, row, False) for row in below if eager is not None] + found


def figure_of(rows: Sequence[StepRow], title: str) -> Figure:
    """Plot seconds of a step against its peak memory, with a line along the fastest steps of stock and of gigamorph."""
    figure, axes = panel(8.2, 5.0, title)
    for ours, shade in ((False, _STOCK_COLOUR), (True, _OURS_COLOUR)):
        own = [row for row in rows if is_ours(row) == ours and row.peak_bytes and row.median_seconds]
        front = fastest_by_memory(own)
        axes.plot(
            [(row.peak_bytes or 0) / 1e9 for row in front],
            [row.median_seconds or 0 for row in front],
            "-",
            color=shade,
            linewidth=2,
            label="gigamorph" if ours else "stock PyTorch, best way",
        )
        for row in own:
            x, y = (row.peak_bytes or 0) / 1e9, row.median_seconds or 0
            axes.plot([x], [y], "o" if row.status == OK else "x", color=shade, markersize=5 if row in front else 4)
            name = row.peer.partition(", ")[2] or PEERS[row.base_peer].label
            text = name if row.status == OK else f"{name} ({row.status})"
            look: Any = {"fontsize": 8} if row in front else {"fontsize": 6, "alpha": 0.7}
            axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", color=shade, **look)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("peak memory of a step in GB")
    axes.set_ylabel("seconds of a step")
    axes.legend(frameon=False)
    return figure
