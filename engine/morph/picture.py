"""Picture of the channel spaces: one bar per space in the order of the forward, with its cost or why it is frozen."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ..report.figure import png
from .planner import CostRow, Growth, cells
from .store import atomic

_ROW = 0.26  # inches
_GROWS, _FROZEN = "#3a7d44", "#b0b0b0"
_REASON = 90  # maximum number of characters


def draw(growth: Growth, title: str = "") -> Figure:
    """Draw one bar per space, as long as the space is wide, with the cost of a channel or the reason of a freeze."""
    rows = growth.rows
    figure = Figure(figsize=(12, 1.2 + _ROW * max(len(rows), 3)))
    axes = figure.subplots()
    widths = [row.space.width for row in rows]
    axes.barh(range(len(rows)), widths, height=0.8, color=[_FROZEN if r.cost is None else _GROWS for r in rows])
    for y, row in enumerate(rows):
        axes.annotate(
            _annotation(row), (row.space.width, y), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [f"{row.space.id}  {row.space.key}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 2.2 * max([1, *widths]))  # room for the text
    axes.set_xlabel("channels (green: can grow)")
    axes.spines[["top", "right"]].set_visible(False)
    image = " x ".join(map(str, growth.shape[2:]))
    axes.set_title(f"{title + ', ' if title else ''}images of {image}: {growth.total}", fontsize=9, loc="left")
    return figure


def save_picture(growth: Growth, path: str | Path, title: str = "") -> None:
    """Write the picture as a PNG file; a failure leaves no partial file.

    Raises:
        MorphError: the file cannot be written.
    """
    picture = png(draw(growth, title))
    with atomic(path) as file:
        file.write(picture)


def _annotation(row: CostRow) -> str:
    if row.cost is None:
        why = row.space.frozen
        return f"{row.space.width}: {why if len(why) <= _REASON else why[: _REASON - 3] + '...'}"
    _, width, _, parameters, flops, memory = cells(row)
    step = f", in steps of {row.step}" if row.step > 1 else ""
    return f"{width}{step}; each more: {parameters} parameters, {flops}FLOP, {memory}"
