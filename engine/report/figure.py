"""Figures as all reports have them: axes without a box, the title at the left, the same bytes for the same figure."""

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
"""Of the classes of masks but the background, over grey images; told apart with every colour vision (Tol, vibrant)."""


def class_colour(number: int) -> str:
    """Of the class 1, 2, ...; after the last colour comes the first again."""
    return CLASS_COLOURS[(number - 1) % len(CLASS_COLOURS)]


def outline_colour(number: int) -> str:
    """The same, halfway to white, so that an outline stands out from an area of its class."""
    return "#" + bytes((one + 255) // 2 for one in bytes.fromhex(class_colour(number)[1:])).hex()


def panel(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """A figure of one pair of axes; inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    open_axes(axes)
    axes.set_title(title, loc="left", fontsize=10)
    return figure, axes


def open_axes(*axes: Axes) -> None:
    """Leave out the lines at the top and at the right."""
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """A figure as PNG, with everything that is drawn in it."""
    counted = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if not _is_named(axis)]
    powers = {text for axis in counted for text in axis.get_ticklabels(which="both")}  # of ten, on logarithmic axes
    for text in figure.findobj(Text):
        if text not in powers:
            text.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue]  (names of files may hold dollars)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _is_named(axis: Axis) -> bool:
    """Whether its ticks have names that are given, no numbers."""
    return isinstance(axis.get_major_formatter(), FuncFormatter)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda p: p.write_bytes(png(figure)), "picture")
