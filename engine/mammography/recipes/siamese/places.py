"""Localisation of findings by distances of patches, measured on the pairs of the test split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....datasets.masks import read_inside
from ....datasets.tables import Record
from ....evaluate.roc import auc
from .pairs import Pair

Array = NDArray[np.float64]
Place = dict[str, float]
"""Result of `localised` for a pair."""


def centres(record: Record) -> list[tuple[float, float]]:
    """Return row and column of each finding's centre: of its box, or of the extent of its outline or mask."""
    found = []
    for finding in record.findings:
        if finding.box is not None:
            found.append(((finding.box[0] + finding.box[1]) / 2, (finding.box[2] + finding.box[3]) / 2))
        elif finding.outline:
            rows, columns = zip(*finding.outline, strict=True)
            found.append(((min(rows) + max(rows)) / 2, (min(columns) + max(columns)) / 2))
        elif finding.mask is not None:
            rows, columns = np.nonzero(read_inside(finding.mask))
            if len(rows):
                found.append(((rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2))
    return found


def holds(boxes: Array, places: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
    """Return which boxes (n, 4: left, top, right, bottom) contain at least one of the places (row, column)."""
    left, top, right, bottom = boxes.T
    found = np.zeros(len(boxes), bool)
    for y, x in places:
        found |= (top <= y) & (y < bottom) & (left <= x) & (x < right)
    return found


def localised(pair: Pair, boxes: Sequence[Array], distances: Array) -> Place | None:
    """Measure how well distances of patches locate a pair's findings; None if no patch has one, or all have.

    Args:
        boxes: of the patches, in the files of the left and of the right image.
        distances: of the patches.

    Returns:
        hit: whether the patch with the largest distance contains the centre of a finding of either breast; with ties,
        the share that do. by_chance: the share of all patches that do. auc: of the patches.
    """
    sides = zip(boxes, (pair.left, pair.right), strict=True)
    positive = np.any([holds(own, centres(record)) for own, record in sides], 0)
    if not 0 < positive.sum() < len(positive):
        return None
    return {
        "hit": float(positive[distances == distances.max()].mean()),
        "by_chance": float(positive.mean()),
        "auc": auc(positive.astype(np.int64), distances) or 0.0,
    }


def localisation(found: Sequence[Place | None]) -> Any:
    """Return the means over the pairs with a result, and their number; a text if there are none."""
    known = [one for one in found if one is not None]
    if not known:
        return "no pair of the test split has a finding in some of its patches"
    return {"pairs": len(known), **{name: float(np.mean([one[name] for one in known])) for name in known[0]}}


def localisation_line(found: Any) -> str:
    """Format the result of `localisation` as a line of the model card."""
    if isinstance(found, str):
        return f"- Locations of findings were not measured: {found}."
    return (
        f"- Locations of findings by the distances, means over {found['pairs']} pairs of the test split with one: the "
        f"patch with the largest distance contains the centre of one in {found['hit']:.0%} ({found['by_chance']:.0%} "
        f"of all patches do); AUC of patches {found['auc']:.3f}."
    )
