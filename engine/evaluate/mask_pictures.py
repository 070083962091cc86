"""Draws an image with a predicted mask and its reference: the whole image, and the region of the largest difference."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label

from ..datasets.dataset import open_record
from ..datasets.masks import Classes, FileMask, highest, highest_of
from ..datasets.tables import Finding, Record
from ..datasets.views import DownsampledSource
from ..images.pixels import PixelSource
from ..report.figure import class_colour, outline_colour

_SIDE = 520
"""Maximum pixels on the longer side of a drawn image."""
Box = tuple[int, int, int, int]


def picture_of(record: Record, predicted: Path, classes: Classes) -> Figure:
    """The stored image, with predicted classes as coloured areas and the table's classes as outlines.

    The left panel shows the whole image, the right panel the area with the largest difference.

    Args:
        record: of the table, with its mask; without one only the prediction is drawn.
        predicted: file of the predicted mask.
        classes: of the masks.

    Raises:
        DataError: if an image or mask cannot be read.
    """
    source = open_record(record, flip=False)
    own = replace(record, findings=(Finding("", mask=predicted),))
    masks = [FileMask(one, classes) for one in (own, record) if any(finding.mask for finding in one.findings)]
    for mask in masks:
        mask.require_size(source)
    _, height, width = source.shape
    factor = max(1, math.ceil(max(height, width) / _SIDE))
    coarse = [highest(mask, factor) for mask in masks]
    box = _place(coarse, factor, height, width)
    whole = _grey(source, (0, height // factor * factor, 0, width // factor * factor), factor)
    low, high = np.quantile(whole, [0.005, 0.998])
    high = max(high, low + 1e-6)
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, whole, coarse, float(low), float(high))
    top, bottom, first, last = (side // factor for side in box)
    left.plot([first, last, last, first, first], [top, top, bottom, bottom, top], color="white", linewidth=0.8)
    left.set_title("whole image", loc="left", fontsize=9)
    near = max(1, math.ceil(max(box[1] - box[0], box[3] - box[2]) / _SIDE))
    box = (box[0] // near * near, box[1], box[2] // near * near, box[3])
    detail = [highest_of(mask.read(*box), near) for mask in masks]
    _draw(right, _grey(source, box, near), detail, float(low), float(high))
    right.set_title(f"rows {box[0]} to {box[1]}, columns {box[2]} to {box[3]}", loc="left", fontsize=9)
    return figure


def _place(masks: list[NDArray[np.uint8]], factor: int, height: int, width: int) -> Box:
    """(top, bottom, left, right) around the connected area of the masks with the largest difference."""
    areas = masks[0] > 0 if len(masks) == 1 else (masks[0] > 0) | (masks[1] > 0)
    apart = masks[0] != masks[-1] if len(masks) > 1 else areas
    found: Any = label(areas)
    parts, count = found
    if not count:
        return 0, height, 0, width
    chosen = int(np.bincount(parts[areas], apart[areas], count + 1)[1:].argmax())
    rows, columns = find_objects(parts)[chosen]
    side = max(rows.stop - rows.start, columns.stop - columns.start) * factor
    beyond = max(side // 2, 64)
    return (
        max(0, rows.start * factor - beyond),
        min(height, rows.stop * factor + beyond),
        max(0, columns.start * factor - beyond),
        min(width, columns.stop * factor + beyond),
    )


def _grey(source: PixelSource, box: Box, factor: int) -> NDArray[np.float32]:
    """Means over factor x factor pixels and the channels in a box."""
    if factor == 1:
        return source.read(*box).mean(0).numpy()
    seen = DownsampledSource(source, factor)
    top, bottom, left, right = box
    rows, columns = min(-(-bottom // factor), seen.shape[1]), min(-(-right // factor), seen.shape[2])
    return seen.read(top // factor, rows, left // factor, columns).mean(0).numpy()


def _draw(axes: Axes, grey: NDArray[np.float32], masks: list[NDArray[np.uint8]], low: float, high: float) -> None:
    axes.imshow(grey, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    rows, columns = grey.shape
    for number in sorted({int(n) for mask in masks for n in np.unique(mask)} - {0}):
        colour = class_colour(number)
        area = masks[0][:rows, :columns] == number
        axes.imshow(area[..., None] * np.array(to_rgba(colour, 0.45)), interpolation="nearest")
        for mask in masks[1:]:
            outline = mask[:rows, :columns] == number
            if outline.any() and not outline.all():
                axes.contour(outline.astype(np.float32), [0.5], colors=[outline_colour(number)], linewidths=1.4)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_axis_off()
