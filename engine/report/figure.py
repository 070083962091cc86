"""The common style of figures in reports: axes without a box, titles at the left, reproducible bytes."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from ..files import write_atomically

CLASS_COLOURS = ("#ee7733", "#33bbee", "#ee3377", "#009988", "#ddcc33", "#aa77dd")
"""Colours of mask classes except the background, on grey images; distinct for colour-blind readers (Tol, vibrant)."""


def class_colour(number: int) -> str:
    """Return the colour of class 1, 2, ...; after the last colour the first is used again."""
    return CLASS_COLOURS[(number - 1) % len(CLASS_COLOURS)]


def outline_colour(number: int) -> str:
    """Return the class colour mixed half with white, so that an outline stands out from an area of its class."""
    return "#" + bytes((one + 255) // 2 for one in bytes.fromhex(class_colour(number)[1:])).hex()


def panel(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """Create a figure with one pair of axes; size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    open_axes(axes)
    axes.set_title(title, loc="left", fontsize=10)
    return figure, axes


def open_axes(*axes: Axes) -> None:
    """Hide the top and right lines of the axes."""
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """Return a figure as PNG, including all artists outside the axes."""
    counted = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if not _is_named(axis)]
    powers = {text for axis in counted for text in axis.get_ticklabels(which="both")}  # of ten, on logarithmic axes
    for text in figure.findobj(Text):
        if text not in powers:
            text.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue]  (file names may contain dollars)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _is_named(axis: Axis) -> bool:
    """Whether the ticks have given names instead of numbers."""
    return isinstance(axis.get_major_formatter(), FuncFormatter)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    write_atomically(path, lambda p: p.write_bytes(png(figure)), "picture")
