"""Peaks of a map, as marks for a free-response ROC."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from scipy import ndimage

from ..train.explanation import Explanation


class Mark(NamedTuple):
    """A position in pixels of the stored file, with the value of the map."""

    row: float
    column: float
    score: float


def find_marks(found: Explanation, count: int = 10) -> list[Mark]:
    """The highest positive peaks of a map, no two in neighbouring cells, by decreasing score.

    A peak is a cell, or a connected group of equal cells, without higher neighbours; the mark is its centre. Scores are
    values of the map. Those of a class activation map are contributions to the log-odds, comparable between images.
    """
    values = found.values.double().cpu().numpy()
    highest = ndimage.maximum_filter(values, size=3, mode="constant", cval=-np.inf)
    is_peak = (values == highest) & (values > 0)
    peaks, number = cast(tuple[np.ndarray, int], ndimage.label(is_peak, structure=np.ones((3, 3))))
    if not number:
        return []
    labels = np.arange(1, number + 1)
    scores = ndimage.maximum(values, peaks, labels)
    middles = np.array(ndimage.center_of_mass(peaks > 0, peaks, labels)) + 0.5
    best = np.argsort(-scores, kind="stable")[:count]
    points = found.points(middles[best][:, ::-1])
    return [Mark(float(y), float(x), float(score)) for (x, y), score in zip(points, scores[best], strict=True)]
