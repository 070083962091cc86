"""Where findings are, and whether distances of patches tell the place: localisation on the pairs of the test split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...datasets.masks import read_inside
from ...datasets.tables import Record
from ...evaluate.roc import auc
from .pairs import Pair

Array = NDArray[np.float64]
Place = dict[str, float]
"""What `localised` finds of a pair."""


def middles(record: Record) -> list[tuple[float, float]]:
    """Row and column of the middle of each finding: of its box, else of what its outline or its mask fills."""
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
    """Which of the boxes (n, 4: left, top, right, bottom) hold one at least of the places (row, column)."""
    left, top, right, bottom = boxes.T
    found = np.zeros(len(boxes), bool)
    for y, x in places:
        found |= (top <= y) & (y < bottom) & (left <= x) & (x < right)
    return found


def localised(pair: Pair, boxes: Sequence[Array], distances: Array) -> Place | None:
    """How well the distances of a pair's patches tell where its findings are; None without one in a patch, or in all.

    Args:
        boxes: of the patches, in the files of the left and of the right image.
        distances: of the patches.

    Returns:
        hit: whether a patch of the largest distance holds the middle of a finding of either breast; of equal ones the
        share that do. by_chance: the share of all patches that do. auc: of the patches.
    """
    sides = zip(boxes, (pair.left, pair.right), strict=True)
    there = np.any([holds(own, middles(record)) for own, record in sides], 0)
    if not 0 < there.sum() < len(there):
        return None
    return {
        "hit": float(there[distances == distances.max()].mean()),
        "by_chance": float(there.mean()),
        "auc": auc(there.astype(np.int64), distances) or 0.0,
    }


def localisation(found: Sequence[Place | None]) -> Any:
    """The means over the pairs of which there is something to say, with their number; a text if there is none."""
    known = [one for one in found if one is not None]
    if not known:
        return "no pair of the test split has a finding in some of its patches"
    return {"pairs": len(known), **{name: float(np.mean([one[name] for one in known])) for name in known[0]}}


def localisation_told(found: Any) -> str:
    """The same as a line of the model card."""
    if isinstance(found, str):
        return f"- Places of findings were not measured: {found}."
    return (
        f"- Places of findings by the distances, means over {found['pairs']} pairs of the test split with one: the "
        f"patch of the largest distance holds the middle of one in {found['hit']:.0%} ({found['by_chance']:.0%} of all "
        f"patches do); AUC of patches {found['auc']:.3f}."
    )
