"""How well masks are predicted: the mean Dice of the images, with intervals over patients."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.tables.cells import Rows, is_number
from ..errors import DataError
from ..files import write_atomically
from .bootstrap import Array, Resamples
from .read import read_rows_of
from .report import format_value, no_interval

DICE = "dice_"
"""Before a class's name, of the columns of `gigamorph predict`."""


def read_dice(path: str | Path, split: str | None) -> Rows | None:
    """The rows of a csv that `gigamorph predict` wrote of masks; None if it has no column dice_NAME.

    Args:
        split: as in `read_cases`.

    Raises:
        DataError: several splits at once, a patient in two, or no rows.
    """
    rows = read_rows_of(Path(path), split, only_with=DICE)
    if rows is not None and not rows.rows:
        raise DataError(f"{path}: holds no rows of split {split}" if split else f"{path}: holds no predictions")
    return rows


def evaluate_dice(rows: Rows, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The mean Dice of each class over the images where it is defined, and the mean of the classes; plain values.

    It is not defined, and the cell empty, where neither mask nor prediction has the class, or there was no mask.

    Raises:
        DataError: a cell that is no Dice, or no image with one.
    """
    names = [name.removeprefix(DICE) for name in rows.header if name.startswith(DICE)]
    values = np.array([[_number(rows, n, DICE + name) for name in names] for n in range(len(rows.rows))])
    if np.isnan(values).all():
        raise DataError(f"{rows.path}: no image has a Dice; predict from a table with the column mask_path")
    patients = [row.get("patient_id", "") for row in rows.rows]
    clusters = [f"patient {one}" if one else f"row {number}" for number, one in enumerate(patients)]

    def means(weights: Array) -> dict[str, Array]:
        there = ~np.isnan(values)
        counts = weights @ there
        with np.errstate(invalid="ignore", divide="ignore"):
            each = np.where(counts > 0, (weights @ np.where(there, values, 0)) / counts, np.nan)
            defined = ~np.isnan(each)
            mean = np.where(defined.any(1), np.nansum(each, 1) / defined.sum(1), np.nan)
        return {**{DICE + name: each[:, column] for column, name in enumerate(names)}, "dice": mean}

    found, around = means(np.ones((1, len(values)))), Resamples(clusters, resamples, seed).spreads(means)
    measures = {
        name: {"value": None if np.isnan(one[0]) else float(one[0]), **around[name].listed()}
        for name, one in found.items()
    }
    counts = (~np.isnan(values)).sum(0).tolist()
    return {
        "kind": "masks",
        "outputs": names,
        "images": {name: int(count) for name, count in zip(names, counts, strict=True)},
        "patients": len(set(patients) - {""}),
        "rows_without_patient": patients.count(""),
        **measures,
        "resamples": resamples,
        "seed": seed,
        "versions": {name: version(name) for name in ("gigamorph", "numpy")},
    }


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


def write_dice(out: str | Path, found: dict[str, Any]) -> Path:
    """Write ``metrics.json`` into `out`; returns its path.

    Raises:
        GigamorphError: if it cannot be written.
    """
    path, text = Path(out) / "metrics.json", json.dumps(found, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text), "metrics")
    return path


def _number(rows: Rows, number: int, column: str) -> float:
    cell = rows.rows[number][column]
    if not cell:
        return np.nan
    if not is_number(cell) or not 0 <= float(cell) <= 1:
        raise DataError(f"{rows.path}, {rows.places[number]}: {column} {cell!r} is no number from 0 to 1")
    return float(cell)
