"""Free-response ROC: how many lesions are found for how many false marks per image.

A mark is a place with a score. It finds a lesion if it lies in the lesion's box; a mark in no box is false. For each
threshold: sensitivity = lesions found by a mark of at least that score / lesions, against false marks / images, all
images counting (Chakraborty, 1989). The mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false marks per image is the
competition performance metric (Niemeijer et al., 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bootstrap import Resamples, interval

Array = NDArray[np.float64]
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_SLACK = 1e-9


@dataclass(frozen=True)
class Marked:
    """One image: its lesions' boxes (lesions, 4), each top, bottom, left, right, ends excluded; and its marks' places
    (marks, 2), each row and column, and scores (marks,)."""

    patient: str
    boxes: Array
    places: Array
    scores: Array


@dataclass(frozen=True)
class Events:
    """All images' lesions and false marks in one list, by falling score.

    Attributes:
        score: at which the event happens; lesions that no mark finds have none and are not listed.
        found: whether a lesion is found (else a false mark is made).
        image: of the event. lesions: (images,) how many each image has.
    """

    score: Array
    found: NDArray[np.bool_]
    image: NDArray[np.int64]
    lesions: Array
    marks: int
    """Marks, with those that find a lesion again."""


def events(images: Sequence[Marked]) -> Events:
    """What happens at which score. A lesion is found at the highest score of the marks in its box."""
    score, found, image, marks = [], [], [], 0
    for number, one in enumerate(images):
        boxes, places = one.boxes.reshape(-1, 1, 4), one.places.reshape(1, -1, 2)
        inside = (boxes[..., 0] <= places[..., 0]) & (places[..., 0] < boxes[..., 1])
        inside &= (boxes[..., 2] <= places[..., 1]) & (places[..., 1] < boxes[..., 3])
        for hits in inside:
            if hits.any():
                score.append(float(one.scores[hits].max()))
                found.append(True)
                image.append(number)
        false = one.scores[~inside.any(0)]
        score += false.tolist()
        found += [False] * len(false)
        image += [number] * len(false)
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
    """False marks per image and sensitivity, (b, thresholds) each, for weights (b, images), by default one of ones.

    From the threshold above all scores on, where both are 0. Sensitivity is NaN without lesions.
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
    """Sensitivity (b,) of the lowest threshold with at most this many false marks per image; no interpolation."""
    last = (false <= rate + _SLACK).sum(1) - 1
    return np.take_along_axis(sensitivity, last[:, None], 1)[:, 0]


def measure(images: Sequence[Marked], *, count: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Sensitivity at each of `RATES` and their mean, with intervals over patients, and the curve."""
    one = events(images)
    lesions = int(one.lesions.sum())
    found: dict[str, Any] = {
        "images": len(images),
        "images_with_lesions": int((one.lesions > 0).sum()),
        "lesions": lesions,
        "marks": one.marks,
    }
    if not lesions:
        return found | {"undefined": "no image of the table has a finding with a box or outline"}

    def statistics(weights: Array) -> dict[str, Array]:
        false, sensitivity = curve(one, weights)
        values = {str(rate): sensitivity_at(false, sensitivity, rate) for rate in RATES}
        return values | {"mean": np.mean(list(values.values()), 0)}

    here = statistics(np.ones((1, len(images))))
    drawn = Resamples([image.patient for image in images], count, seed).values(statistics)
    found["sensitivity"] = [
        {"false_marks_per_image": rate, "value": float(here[str(rate)][0]), "bootstrap": interval(drawn[str(rate)])}
        for rate in RATES
    ]
    found["mean_sensitivity"] = {"value": float(here["mean"][0]), "bootstrap": interval(drawn["mean"])}
    false, sensitivity = curve(one)
    found["curve"] = {"false_marks_per_image": false[0].tolist(), "sensitivity": sensitivity[0].tolist()}
    return found
