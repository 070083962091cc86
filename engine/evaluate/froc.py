"""Free-response ROC: the fraction of lesions that are found, against the false marks per image.

A mark is a position with a score. It finds a lesion if it is in the lesion's box, or, for marks that are boxes, if the
intersection over union of the boxes is at least a given value; otherwise it is false. For each threshold: sensitivity =
lesions found by a mark with at least that score / lesions, against false marks / images, over all images (Chakraborty,
1989). The mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false marks per image is the competition performance metric
(Niemeijer et al., 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .bootstrap import Array, Resamples

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_SLACK = 1e-9


@dataclass(frozen=True)
class Marked:
    """One image with its lesions and marks.

    Attributes:
        patient: of the image.
        boxes: (lesions, 4) boxes of the lesions: top, bottom, left, right, ends excluded.
        places: (marks, 2) row and column of each mark.
        scores: (marks,) of the marks.
        outlines: (marks, 4) boxes of the marks, if they are boxes.
    """

    patient: str
    boxes: Array
    places: Array
    scores: Array
    outlines: Array | None = None

    def __post_init__(self) -> None:
        for name in ("boxes", "places", "outlines"):
            values = getattr(self, name)
            if values is not None and not np.isfinite(values).all():
                raise DataError(f"{self.patient}: {name} of lesions or marks must be finite")
        if np.isnan(self.scores).any() or len(self.scores) != len(self.places):
            raise DataError(f"{self.patient}: each of the {len(self.places)} marks must have a score")
        for values in (self.boxes, self.outlines):
            if values is not None and not (values.reshape(-1, 4)[:, 1::2] > values.reshape(-1, 4)[:, ::2]).all():
                raise DataError(f"{self.patient}: a box is empty; boxes must be top, bottom, left, right in this order")

    def hits(self, iou: float | None = None) -> NDArray[np.bool_]:
        """Whether a lesion is found by a mark: (lesions, marks)."""
        boxes = self.boxes.reshape(-1, 1, 4)
        if iou is None:
            places = self.places.reshape(1, -1, 2)
            inside = (boxes[..., 0] <= places[..., 0]) & (places[..., 0] < boxes[..., 1])
            return inside & (boxes[..., 2] <= places[..., 1]) & (places[..., 1] < boxes[..., 3])
        if self.outlines is None:
            raise DataError("the overlap of marks and lesions needs marks with boxes: top, bottom, left and right")
        marks = self.outlines.reshape(1, -1, 4)
        low, high = np.maximum(boxes, marks), np.minimum(boxes, marks)
        common = np.maximum(high[..., 1] - low[..., 0], 0) * np.maximum(high[..., 3] - low[..., 2], 0)
        return common >= iou * (_area(boxes) + _area(marks) - common)


def _area(boxes: Array) -> Array:
    return (boxes[..., 1] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 2])


@dataclass(frozen=True)
class Events:
    """Found lesions and false marks of all images in one list, by decreasing score.

    Attributes:
        score: of the event; lesions that no mark finds are not listed.
        found: whether a lesion is found; otherwise the event is a false mark.
        image: of the event.
        lesions: (images,) number of lesions.
    """

    score: Array
    found: NDArray[np.bool_]
    image: NDArray[np.int64]
    lesions: Array
    marks: int
    """Number of marks, including several marks of one lesion."""


def events(images: Sequence[Marked], iou: float | None = None) -> Events:
    """The events of images. A lesion is found at the highest score of the marks that find it."""
    score, found, image, marks = [], [], [], 0
    for number, one in enumerate(images):
        inside = one.hits(iou)
        best = [float(one.scores[hits].max()) for hits in inside if hits.any()]
        false = one.scores[~inside.any(0)].tolist()
        score += best + false
        found += [True] * len(best) + [False] * len(false)
        image += [number] * (len(best) + len(false))
        marks += len(one.scores)
    order = np.argsort(-np.array(score, np.float64), kind="stable")
    return Events(
        np.array(score, np.float64)[order],
        np.array(found, bool)[order],
        np.array(image, np.int64)[order],
        np.array([len(one.boxes) for one in images], np.float64),
        marks,
    )


def curve(one: Events, weights: Array | None = None) -> tuple[Array, Array]:
    """False marks per image and sensitivity, (b, thresholds) each, for weights (b, images), by default equal weights.

    The first threshold is above all scores, so both are 0. Sensitivity is NaN without lesions.
    """
    weights = np.ones((1, len(one.lesions))) if weights is None else weights
    ends = np.flatnonzero(np.append(one.score[1:] != one.score[:-1], True)) if len(one.score) else np.arange(0)
    at = weights[:, one.image]
    zero = np.zeros((len(weights), 1))
    found = np.concatenate([zero, np.cumsum(at * one.found, 1)[:, ends]], 1)
    false = np.concatenate([zero, np.cumsum(at * ~one.found, 1)[:, ends]], 1)
    lesions = (weights @ one.lesions)[:, None]
    images = np.maximum(weights.sum(1), 1)[:, None]
    return false / images, np.divide(found, lesions, out=np.full_like(found, np.nan), where=lesions > 0)


def sensitivity_at(false: Array, sensitivity: Array, rate: float) -> Array:
    """Sensitivity (b,) at the lowest threshold with at most this rate of false marks per image; no interpolation."""
    last = (false <= rate + _SLACK).sum(1) - 1
    return np.take_along_axis(sensitivity, last[:, None], 1)[:, 0]


def measure(
    images: Sequence[Marked],
    *,
    rates: Sequence[float] = RATES,
    iou: float | None = None,
    count: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Sensitivity at the rates of false marks per image, and their mean, with intervals over patients; and the curve.

    Args:
        images: with lesions and marks.
        rates: false marks per image.
        iou: see `Marked.hits`.
        count, seed: of the bootstrap.

    Raises:
        DataError: for rates below 0, an `iou` that is not above 0 and at most 1, or marks without boxes for it.
    """
    if any(not np.isfinite(rate) or rate < 0 for rate in rates) or not rates:
        raise DataError(f"false marks per image must be at least 0, not {', '.join(map(str, rates)) or 'none'}")
    if iou is not None and not 0 < iou <= 1:
        raise DataError(f"the overlap of a mark and a lesion must be above 0 and at most 1, not {iou:g}")
    one = events(images, iou)
    lesions = int(one.lesions.sum())
    found: dict[str, Any] = {
        "images": len(images),
        "images_with_lesions": int((one.lesions > 0).sum()),
        "lesions": lesions,
        "marks": one.marks,
        "iou": iou,
    }
    if not lesions:
        return found | {"undefined": "no image of the table has a finding with a box or outline"}

    def statistics(weights: Array) -> dict[str, Array]:
        false, sensitivity = curve(one, weights)
        values = {str(rate): sensitivity_at(false, sensitivity, rate) for rate in rates}
        return values | {"mean": np.mean(list(values.values()), 0)}

    here = statistics(np.ones((1, len(images))))
    around = Resamples([image.patient for image in images], count, seed).spreads(statistics)
    found["sensitivity"] = [
        {"false_marks_per_image": rate, "value": float(here[str(rate)][0]), **around[str(rate)].listed()}
        for rate in rates
    ]
    found["mean_sensitivity"] = {"value": float(here["mean"][0]), **around["mean"].listed()}
    false, sensitivity = curve(one)
    found["curve"] = {"false_marks_per_image": false[0].tolist(), "sensitivity": sensitivity[0].tolist()}
    return found
