"""Writes an evaluation of masks: ``metrics.json``, plots, pictures of the worst images, and one HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from ..datasets.tables import Box, Finding, Record, read_table
from ..datasets.tables.cells import Rows
from ..datasets.views import DownsampledSource
from ..errors import DataError
from ..images.pixels import PixelSource
from ..report.figure import class_colour, open_axes, outline_colour, png
from ..report.page import TextTable
from .dice import DICE, SHARE, Array, classes_of_masks, dice_of, patients_of
from .join import ImageRecords
from .report import format_value, write_results

LISTED, PICTURED = 20, 6
_SIDE = 520
"""Maximum pixels on the longer side of a drawn image."""


def write_dice_report(out: str | Path, rows: Rows, found: dict[str, Any], table: str | Path | None = None) -> Path:
    """Write ``metrics.json``, the plots as PNG and ``report.html`` into `out`; returns the page's path.

    Rows are identified by their line in the predictions, without patients.

    Args:
        out: folder of the report.
        rows: the evaluated rows.
        found: the result of `evaluate_dice`, with the sources under the keys of `SOURCES`.
        table: csv that was predicted; the worst images are drawn with its masks, if the predictions name mask files,
            which those of a cross-validation do not.

    Raises:
        DataError: if an image or mask cannot be read, or is not in the table.
        GigamorphError: if a file cannot be written.
    """
    names, values = dice_of(rows)
    means = _means(values)
    order = [int(n) for n in np.argsort(means, kind="stable") if not np.isnan(means[n])]
    pictures = {"dice": png(_figure(names, values, means, patients_of(rows)))}
    if table is not None and "mask" in rows.header:
        pictures |= _pictures(rows, order[:PICTURED], Path(table))
    return write_results(
        out,
        found,
        "masks.html",
        pictures,
        overview=_overview(found),
        patients=found["patients"],
        without=found["rows_without_patient"],
        notes=[f"{name}: {found[DICE + name]['why']}" for name in names if "why" in found[DICE + name]],
        worst=_worst(rows, names, values, order),
        furthest=[
            (f"{rows.places[n]}: Dice {means[n]:.3f}", pictures[f"furthest_{i}"])
            for i, n in enumerate(order[: len(pictures) - 1])
        ],
        undefined=len(means) - len(order),
        images=len(means),
    )


def _means(values: Array) -> Array:
    """The mean Dice (images,) over the defined classes."""
    there = ~np.isnan(values)
    return np.where(there.any(1), np.nansum(values, 1) / np.maximum(there.sum(1), 1), np.nan)


def _overview(found: dict[str, Any]) -> TextTable:
    rows = []
    for name in found["outputs"]:
        low, middle, high = found["quartiles"][name] or (None, None, None)
        spread = "" if low is None else f"{low:.3f}, {middle:.3f}, {high:.3f}"
        each = format_value(found["per_patient"][DICE + name])
        rows.append([name, found["images"][name], format_value(found[DICE + name]), each, spread])
    if len(rows) > 1:
        each = format_value(found["per_patient"]["dice"])
        rows.append(["mean of the classes", "", format_value(found["dice"]), each, ""])
    head = ["class", "images", "mean of the images", "mean of the patients", "quartiles of the images"]
    return TextTable(head, rows)


def _worst(rows: Rows, names: Sequence[str], values: Array, order: Sequence[int]) -> TextTable:
    listed = []
    for n in order[:LISTED]:
        row = rows.rows[n]
        who = {"row": rows.places[n], **{key: row.get(key, "") for key in ("split", "fold", "laterality", "view")}}
        cells = {
            f"Dice, {name}": "" if np.isnan(one) else f"{one:.3f}" for name, one in zip(names, values[n], strict=True)
        }
        found = {name: row.get(SHARE + name, "") for name in names}
        shares = {f"% of the image, {name}": cell and f"{100 * float(cell):.3g}" for name, cell in found.items()}
        listed.append({**who, **cells, **shares})
    return TextTable.of(listed)


def _pictures(rows: Rows, numbers: Sequence[int], table: Path) -> dict[str, bytes]:
    rows.require("image_path")
    classes = classes_of_masks(rows)
    assert classes is not None
    known = ImageRecords(read_table(table, labels=False, check_files=False).records, table)
    found = {}
    for i, n in enumerate(numbers):
        record = _record(rows, n, known, table)
        found[f"furthest_{i}"] = png(picture_of(record, rows.path.parent / rows.rows[n]["mask"], classes))
    return found


def _record(rows: Rows, number: int, known: ImageRecords, table: Path) -> Record:
    name = rows.rows[number]["image_path"]
    for folder in (Path(), rows.path.parent):
        if (record := known.find(folder / name, rows.rows[number])) is not None:
            return record
    raise DataError(f"{rows.path}, {rows.places[number]}: {name} is not in {table}; use the table that was predicted")


def _figure(names: Sequence[str], values: Array, means: Array, patients: Sequence[str]) -> Figure:
    """A histogram of the images' Dice, and each patient's mean with the range of its images."""
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    open_axes(left, right)
    for number, name in enumerate(names, 1):
        shown = values[:, number - 1]
        left.hist(
            shown[~np.isnan(shown)],
            bins=np.linspace(0, 1, 21).tolist(),
            histtype="stepfilled" if len(names) == 1 else "step",
            color=class_colour(number),
            linewidth=1.6,
            label=name,
        )
    if len(names) > 1:
        left.legend(fontsize=8, loc="upper left")
    left.set(xlabel="Dice", ylabel="images", xlim=(0, 1))
    left.yaxis.get_major_locator().set_params(integer=True)
    left.set_title("Dice of the images", loc="left", fontsize=10)
    there = ~np.isnan(means)
    _, own = np.unique(np.array(patients)[there], return_inverse=True)
    of_each = [means[there][own == n] for n in range(int(own.max()) + 1)]
    of_each.sort(key=lambda one: (float(one.mean()), float(one.min())))
    places = np.arange(1, len(of_each) + 1)
    right.vlines(places, [one.min() for one in of_each], [one.max() for one in of_each], color="0.75", linewidth=1.2)
    right.plot(places, [one.mean() for one in of_each], ".", color="0.2", markersize=5 if len(of_each) < 200 else 2)
    right.set(xlabel="patients, the lowest mean first", ylabel="Dice", ylim=(-0.02, 1.02))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_title("Mean and range of each patient's images", loc="left", fontsize=10)
    return figure


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
