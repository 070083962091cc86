"""How well masks are predicted: the mean Dice of images and of patients, with intervals over patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.masks import Classes
from ..datasets.tables.cells import Rows, is_number
from ..errors import DataError
from ..versions import versions
from .bootstrap import Array, Resamples, listed
from .class_names import in_order
from .read import note_of, read_rows_of
from .report import format_value, no_interval

DICE = "dice_"
"""Before a class's name, of the columns of `gigamorph predict`."""
SHARE = "share_"
"""Likewise, the part of the image's pixels that the class takes; of the background too."""
_UNDEFINED = "not defined: no image has the class, in its mask or its prediction"


def read_dice(path: str | Path, split: str | None) -> tuple[Rows, dict[str, dict[str, int]]] | None:
    """The rows of a csv that `gigamorph predict` wrote of masks, and their counts; None if it has no column dice_NAME.

    Args:
        split: as in `read.read_parts`, which has the counts.

    Raises:
        DataError: several splits at once, a patient in two, or no rows.
    """
    return read_rows_of(Path(path), split, only_with=DICE)


def classes_of_masks(rows: Rows) -> Classes | None:
    """What the values of the masks mean that a table is of, by its columns and the note beside it; None of others."""
    names = [name.removeprefix(SHARE) for name in rows.header if name.startswith(SHARE)]
    others = [name.removeprefix(DICE) for name in rows.header if name.startswith(DICE)]
    if not others:
        return None
    names = names or ["background", *others]
    noted = note_of(rows.path).get("masks")
    noted = noted if isinstance(noted, dict) else {}
    order, _ = in_order(names, noted.get("classes", names))
    return Classes(tuple(order), binary=bool(noted.get("binary")))


def dice_of(rows: Rows) -> tuple[list[str], Array]:
    """The classes, and the Dice of each in each image (images, classes), NaN where it is not defined.

    Raises:
        DataError: a cell that is no Dice, or no image with one.
    """
    names = [name.removeprefix(DICE) for name in rows.header if name.startswith(DICE)]
    values = np.array([[_number(rows, n, DICE + name) for name in names] for n in range(len(rows.rows))])
    if np.isnan(values).all():
        raise DataError(f"{rows.path}: no image has a Dice; predict from a table with the column mask_path")
    return names, values


def patients_of(rows: Rows) -> list[str]:
    """Who each row is of; rows of nobody stand for themselves."""
    patients = [row.get("patient_id", "") for row in rows.rows]
    return [f"patient {one}" if one else f"row {number}" for number, one in enumerate(patients)]


def evaluate_dice(rows: Rows, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The mean Dice of each class over the images where it is defined, and the mean of the classes; plain values.

    It is not defined, and the cell empty, where neither mask nor prediction has the class, or there was no mask. Under
    "per_patient" each patient counts the same: the mean over patients of the means of their images. Under "quartiles"
    the 25, 50 and 75 percentiles of the images.

    Raises:
        DataError: a cell that is no Dice, or no image with one.
    """
    names, values = dice_of(rows)
    clusters = patients_of(rows)
    there = ~np.isnan(values)
    _, own = np.unique(clusters, return_inverse=True)
    of_patient = np.zeros((own.max() + 1, len(names)))
    np.add.at(of_patient, own, there)

    def measured(shares: Array) -> dict[str, Any]:
        """Of images that count by shares (images, classes)."""

        def means(weights: Array) -> dict[str, Array]:
            counts = weights @ shares
            with np.errstate(invalid="ignore", divide="ignore"):
                each = np.where(counts > 0, (weights @ np.where(there, values * shares, 0)) / counts, np.nan)
                defined = ~np.isnan(each)
                mean = np.where(defined.any(1), np.nansum(each, 1) / defined.sum(1), np.nan)
            return {**{DICE + name: each[:, column] for column, name in enumerate(names)}, "dice": mean}

        found, around = means(np.ones((1, len(values)))), Resamples(clusters, resamples, seed).spreads(means)
        return {name: listed(one[0], around[name], _UNDEFINED) for name, one in found.items()}

    patients = [row.get("patient_id", "") for row in rows.rows]
    return {
        "kind": "masks",
        "outputs": names,
        "images": {name: int(count) for name, count in zip(names, there.sum(0), strict=True)},
        "patients": len(set(patients) - {""}),
        "rows_without_patient": patients.count(""),
        **measured(there.astype(np.float64)),
        "per_patient": measured(there / np.maximum(of_patient[own], 1)),
        "quartiles": {name: _quartiles(values[there[:, n], n]) for n, name in enumerate(names)},
        "resamples": resamples,
        "seed": seed,
        "versions": versions("gigamorph", "numpy"),
    }


def _quartiles(values: Array) -> list[float] | None:
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist() if len(values) else None


def dice_headline(found: dict[str, Any]) -> list[str]:
    """A line for each class, and one for their mean."""
    told = []
    for name in found["outputs"]:
        told.append((name, found[DICE + name], f", {found['images'][name]} images"))
    if len(told) > 1:
        told.append(("mean of the classes", found["dice"], ""))
    return [
        f"{name}: Dice {format_value(one)}{images}" + (f"; {no_interval(one)}" if no_interval(one) else "")
        for name, one, images in told
    ]


def _number(rows: Rows, number: int, column: str) -> float:
    cell = rows.rows[number][column]
    if not cell:
        return np.nan
    if not is_number(cell) or not 0 <= float(cell) <= 1:
        raise DataError(f"{rows.path}, {rows.places[number]}: {column} {cell!r} is no number from 0 to 1")
    return float(cell)
