"""Measures of predicted masks: the mean Dice of images and of patients, with intervals over patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.masks import Classes
from ..datasets.tables.cells import Rows, is_number
from ..errors import DataError
from ..versions import versions
from .bootstrap import Array, Resamples, listed
from .cases import counted_patients
from .class_names import in_order
from .read import note_of, read_rows_of
from .report import format_value, no_interval

DICE = "dice_"
"""Prefix of a column of `gigamorph predict`, before the class's name."""
SHARE = "share_"
"""Prefix of the columns with the fraction of the image's pixels of each class, including the background."""
_UNDEFINED = "not defined: no image has the class, in its mask or its prediction"


def read_dice(path: str | Path, split: str | None) -> tuple[Rows, dict[str, dict[str, int]]] | None:
    """The rows of a csv of predicted masks by `gigamorph predict`, and their counts; None without a column dice_NAME.

    Args:
        path: of the csv.
        split: see `read.read_parts`, also on the counts.

    Raises:
        DataError: for several splits without a choice, a patient in two splits, or no rows.
    """
    return read_rows_of(Path(path), split, only_with=DICE)


def classes_of_masks(rows: Rows) -> Classes | None:
    """The classes of a table of masks, from its columns and its JSON file; None for other tables."""
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
    """The classes, and the Dice of each image and class (images, classes), NaN where undefined.

    Raises:
        DataError: for an invalid Dice, or if no image has one.
    """
    names = [name.removeprefix(DICE) for name in rows.header if name.startswith(DICE)]
    values = np.array([[_number(rows, n, DICE + name) for name in names] for n in range(len(rows.rows))])
    if np.isnan(values).all():
        raise DataError(f"{rows.path}: no image has a Dice; predict with a table that has a column mask_path")
    return names, values


def patients_of(rows: Rows) -> list[str]:
    """The patient of each row; rows without a patient form their own clusters."""
    patients = [row.get("patient_id", "") for row in rows.rows]
    return [f"patient {one}" if one else f"row {number}" for number, one in enumerate(patients)]


def evaluate_dice(rows: Rows, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The mean Dice of each class over the images where it is defined, and the mean of the classes; plain values.

    It is undefined, with an empty cell, if neither mask nor prediction has the class, or there is no mask.
    "per_patient" weights patients equally: the mean over patients of the means of their images. "quartiles" are the 25,
    50 and 75 percentiles of the images.

    Args:
        rows: result of `read_dice`.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: for an invalid Dice, or if no image has one.
    """
    names, values = dice_of(rows)
    clusters = patients_of(rows)
    there = ~np.isnan(values)
    _, own = np.unique(clusters, return_inverse=True)
    of_patient = np.zeros((own.max() + 1, len(names)))
    np.add.at(of_patient, own, there)

    def measured(shares: Array) -> dict[str, Any]:
        """The means with weights `shares` (images, classes) of the images."""

        def means(weights: Array) -> dict[str, Array]:
            counts = weights @ shares
            with np.errstate(invalid="ignore", divide="ignore"):
                each = np.where(counts > 0, (weights @ np.where(there, values * shares, 0)) / counts, np.nan)
                defined = ~np.isnan(each)
                mean = np.where(defined.any(1), np.nansum(each, 1) / defined.sum(1), np.nan)
            return {**{DICE + name: each[:, column] for column, name in enumerate(names)}, "dice": mean}

        found, around = means(np.ones((1, len(values)))), Resamples(clusters, resamples, seed).spreads(means)
        return {name: listed(one[0], around[name], _UNDEFINED) for name, one in found.items()}

    return {
        "kind": "masks",
        "outputs": names,
        "images": {name: int(count) for name, count in zip(names, there.sum(0), strict=True)},
        **counted_patients([row.get("patient_id", "") for row in rows.rows]),
        **measured(there.astype(np.float64)),
        "per_patient": measured(there / np.maximum(of_patient[own], 1)),
        "quartiles": {
            name: np.quantile(values[there[:, n], n], [0.25, 0.5, 0.75]).tolist() if there[:, n].any() else None
            for n, name in enumerate(names)
        },
        "resamples": resamples,
        "seed": seed,
        "versions": versions("gigamorph", "numpy"),
    }


def dice_headline(found: dict[str, Any]) -> list[str]:
    """A summary line for each class, and one for their mean."""
    lines = []
    for name in found["outputs"]:
        lines.append((name, found[DICE + name], f", {found['images'][name]} images"))
    if len(lines) > 1:
        lines.append(("mean of the classes", found["dice"], ""))
    return [
        f"{name}: Dice {format_value(one)}{images}" + (f"; {no_interval(one)}" if no_interval(one) else "")
        for name, one, images in lines
    ]


def _number(rows: Rows, number: int, column: str) -> float:
    cell = rows.rows[number][column]
    if not cell:
        return np.nan
    if not is_number(cell) or not 0 <= float(cell) <= 1:
        raise DataError(f"{rows.path}, {rows.places[number]}: {column} {cell!r} must be a number from 0 to 1")
    return float(cell)
