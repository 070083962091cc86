"""Writes an evaluation of masks: ``metrics.json``, plots, pictures of the worst images, and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..datasets.tables import Record, read_table
from ..datasets.tables.cells import Rows
from ..errors import DataError
from ..report.figure import class_colour, open_axes, png
from ..report.page import Table
from .dice import DICE, SHARE, classes_of_masks, dice_of, patients_of
from .join import ImageRecords
from .mask_pictures import picture_of
from .report import format_value, write_results

Array = NDArray[np.float64]
LISTED, PICTURED = 20, 6


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
        resamples=found["resamples"],
        seed=found["seed"],
        versions=", ".join(f"{name} {text}" for name, text in found["versions"].items()),
    )


def _means(values: Array) -> Array:
    """The mean Dice (images,) over the defined classes."""
    there = ~np.isnan(values)
    return np.where(there.any(1), np.nansum(values, 1) / np.maximum(there.sum(1), 1), np.nan)


def _overview(found: dict[str, Any]) -> Table:
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
    return Table(head, rows)


def _worst(rows: Rows, names: Sequence[str], values: Array, order: Sequence[int]) -> Table:
    listed = []
    for n in order[:LISTED]:
        row = rows.rows[n]
        who = {"row": rows.places[n], **{key: row.get(key, "") for key in ("split", "fold", "laterality", "view")}}
        cells = {
            f"Dice, {name}": "" if np.isnan(one) else f"{one:.3f}" for name, one in zip(names, values[n], strict=True)
        }
        shares = {f"% of the image, {name}": _percent(row.get(SHARE + name, "")) for name in names}
        listed.append({**who, **cells, **shares})
    return Table.of(listed)


def _percent(cell: str) -> str:
    return f"{100 * float(cell):.3g}" if cell else ""


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
