"""Figures of results: names are at the ends of their lines, axes have units, and a line that ends early says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.figure import panel
from .peers import PEERS
from .results import EQUAL_MEMORY, NOT_RUN, OK, OUT_OF_MEMORY, WRONG, LimitRow, StepRow

_COLOURS = {
    "stock": "#c0392b",
    "channels-last": "#d98880",
    "bf16": "#af7ac5",
    "compile": "#7d6608",
    "checkpoint": "#d68910",
    "lightstream": "#6c7a89",
    EQUAL_MEMORY: "#aab7b8",
    "gigamorph": "#1f618d",
}
_DEFAULT_COLOUR = "#2e86c1"
_DRAWN = (OK, WRONG, OUT_OF_MEMORY)
_LINE_HEIGHT = 0.052  # height of a line of text, as a share of the axes


def label(peer: str) -> str:
    """Return a peer's name for figures and tables."""
    return PEERS[peer].label if peer in PEERS else peer


def colour(peer: str) -> str:
    return _COLOURS.get(peer, _DEFAULT_COLOUR)


def _digits(value: float) -> str:
    """Format with two digits, or all digits before the decimal point if there are more."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def memory_figure(rows: Sequence[StepRow], title: str) -> Figure:
    """Plot peak memory of a step against the image's pixels; a line ends in a cross if the peer runs out of memory.

    With a single size, plot one bar per peer.
    """
    if _has_one_size(rows):
        return _bar_plot(rows, title, lambda row: (row.peak_bytes or 0) / 1e9, "GB", "peak memory of a step in GB")
    figure, axes = panel(8.2, 4.8, title)
    caps = {row.cap_bytes for row in rows if row.cap_bytes}
    cap = max(caps) / 1e9 if caps else None
    ends: list[tuple[float, float, str, str]] = []
    top = max((row.peak_bytes or 0) / 1e9 for row in rows)
    for peer, x, y, end in _draw_lines(axes, rows, lambda row: row.peak_bytes and row.peak_bytes / 1e9):
        if end is not None:
            height = cap or y[-1] * end.task.megapixels / x[-1]
            top = max(top, height)
            axes.plot([x[-1], end.task.megapixels], [y[-1], height], ":", color=colour(peer), linewidth=1.6)
            axes.plot([end.task.megapixels], [height], "x", color=colour(peer), markersize=11, markeredgewidth=3)
            name = f"{label(peer)}: out of memory"
            ends.append((end.task.megapixels, height, name, colour(peer)))
        else:
            ends.append((x[-1], y[-1], f"{label(peer)}, {_digits(y[-1])} GB", colour(peer)))
    if cap is not None and top > 0.5 * cap:  # otherwise no line is near the cap
        last = max(row.task.megapixels for row in rows if row.status != NOT_RUN)
        axes.plot([0, last], [cap, cap], color="0.35", linestyle="--", linewidth=1)
        text = f"cap of a step: {cap:.3g} GB"
        axes.text(0.01 * last, cap, text, color="0.35", va="bottom", fontsize=9)
        top = max(top, cap)
    axes.set_ylim(0, 1.15 * top)
    _finish(axes, rows, ends, "peak memory of a step in GB")
    return figure


def throughput_figure(rows: Sequence[StepRow], title: str) -> Figure:
    """Plot megapixels per second against the image's pixels; with a single size, one bar per peer."""
    if _has_one_size(rows):
        return _bar_plot(rows, title, lambda row: row.mpx_per_s or 0, "Mpx/s", "megapixels per second")
    figure, axes = panel(8.2, 4.8, title)
    ends = []
    for peer, x, y, end in _draw_lines(axes, rows, lambda row: row.mpx_per_s):
        text = f"{label(peer)}, {_digits(y[-1])} Mpx/s"
        if end is not None:
            axes.plot([x[-1]], [y[-1]], "x", color=colour(peer), markersize=11, markeredgewidth=3)
            text += ", then out of memory"
        ends.append((x[-1], y[-1], text, colour(peer)))
    axes.set_ylim(0, 1.15 * max((row.mpx_per_s or 0) for row in rows))
    _finish(axes, rows, ends, "megapixels per second")
    return figure


def _has_one_size(rows: Sequence[StepRow]) -> bool:
    return len({row.task.image for row in rows if row.status in _DRAWN}) == 1


def _bar_plot(rows: Sequence[StepRow], title: str, value: Callable[[StepRow], float], unit: str, what: str) -> Figure:
    """Plot one bar per peer, the longest on top; a peer that ran out of memory has a label without a bar."""
    run = sorted((row for row in rows if row.status in _DRAWN), key=value)
    bars = [
        (row.peer, 0.0, "out of memory")
        if row.status == OUT_OF_MEMORY
        else (row.peer, value(row), f"{_digits(value(row))} {unit}")
        for row in run
    ]
    image = run[0].task.image
    figure, axes = _bars(bars, f"{title}, {image[2]} × {image[3]} pixels")
    axes.set_xlim(0, 1.3 * max(length for _, length, _ in bars) or 1)
    axes.set_xlabel(what)
    return figure


def roofline_figure(rows: Sequence[StepRow], title: str) -> Figure:
    """Plot the share of stock's roofline at the largest size that most peers reached, one bar each."""
    rows = [row for row in rows if row.status in (OK, WRONG)]
    sizes = [row.task.megapixels for row in rows if row.roofline_share]
    size = max(set(sizes), key=lambda s: (sizes.count(s), s))
    bars = [(row.peer, 100 * row.roofline_share) for row in rows if row.task.megapixels == size and row.roofline_share]
    bars.sort(key=lambda bar: bar[1])
    figure, axes = _bars([(peer, share, f"{share:.0f} %") for peer, share in bars], f"{title}, {size:.3g} megapixels")
    axes.axvline(100, color="0.35", linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.15 * max(100, *(share for _, share in bars)))
    axes.set_xlabel("speed as a share of the roofline of unfused ops on this machine, in percent")
    return figure


def limits_figure(rows: Sequence[LimitRow], title: str) -> Figure:
    """Plot the largest image of each peer in megapixels, one bar each."""
    bars = [
        (row.peer, row.side**2 / 1e6, f"{row.side} × {row.side}{'' if row.too_large else ' and more'}")
        for row in sorted(rows, key=lambda row: row.side or 0)
        if row.side
    ]
    figure, axes = _bars(bars, title)
    axes.set_xlim(0, 1.3 * bars[-1][1])
    axes.set_xlabel("largest image in megapixels")
    return figure


def _bars(bars: Sequence[tuple[str, float, str]], title: str) -> tuple[Figure, Axes]:
    """Plot one bar per peer with its length and the text at its end; the first is the lowest."""
    figure, axes = panel(8.2, 1.3 + 0.45 * len(bars), title)
    for number, (peer, length, text) in enumerate(bars):
        axes.barh(number, length, color=colour(peer), height=0.62)
        axes.text(length, number, f" {text}", va="center", color=colour(peer))
    axes.set_yticks(range(len(bars)), [label(peer) for peer, *_ in bars])
    return figure, axes


def _draw_lines(
    axes: Axes, rows: Sequence[StepRow], value: Callable[[StepRow], float | None]
) -> Iterator[tuple[str, list[float], list[float], StepRow | None]]:
    """Draw the line of each peer; yield peer, megapixels, values, and the row at which it ran out of memory after them.

    gigamorph is last, so that its line is on top.
    """
    for peer in sorted(dict.fromkeys(row.peer for row in rows), key=lambda peer: peer == "gigamorph"):  # stable sort
        line = sorted((row for row in rows if row.peer == peer), key=lambda row: row.task.megapixels)
        points = [(row.task.megapixels, found) for row in line if row.status in (OK, WRONG) and (found := value(row))]
        if points:
            x, y = [list(of) for of in zip(*points, strict=True)]
            axes.plot(x, y, "o-", color=colour(peer), linewidth=2.6 if peer == "gigamorph" else 1.6, markersize=5)
            short = (row for row in line if row.status == OUT_OF_MEMORY and row.task.megapixels > x[-1])
            yield peer, x, y, next(short, None)


def _finish(axes: Axes, rows: Sequence[StepRow], ends: list[tuple[float, float, str, str]], what: str) -> None:
    """Format the axes, and put names at the ends of their lines without overlap."""
    run = [row.task.megapixels for row in rows if row.status != NOT_RUN]
    last = max(run)
    axes.set_xlim(0, 1.5 * last)
    shown: list[float] = []
    for size in sorted(set(run)):
        if not shown or size - shown[-1] > 0.06 * last:
            shown.append(size)
    axes.set_xticks(shown, [f"{size:.3g}" for size in shown])
    axes.set_xlabel("image in megapixels" + _sides(rows))
    axes.set_ylabel(what)
    height = axes.get_ylim()[1]
    by_height = sorted(ends, key=lambda end: end[1])
    lowest = -math.inf
    for x, y, text, shade in by_height:
        position = max(y, lowest + _LINE_HEIGHT * height)
        lowest = position
        axes.annotate(
            text,
            (x, y),
            xytext=(x + 0.02 * last, position),
            textcoords="data",
            color=shade,
            va="center",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _sides(rows: Sequence[StepRow]) -> str:
    """Return the sides as text if all images are square."""
    sizes = {row.task.image[2:] for row in rows}
    if any(height != width for height, width in sizes):
        return ""
    return " (square: " + ", ".join(str(side) for side, _ in sorted(sizes)) + " pixels)"
