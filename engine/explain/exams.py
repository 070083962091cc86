"""Explains exams of several views: the combined log-odds, as of `gigamorph predict`, and the strongest contribution.

An exam has the log-odds of its worse breast, a breast the mean probability of its views. A position that contributes a
to the log-odds z_i of a view contributes a dz / dz_i to the log-odds z of the breast, and so of the exam. For n views
with probabilities p_i and mean p, dz / dz_i = p_i (1 - p_i) / (n p (1 - p)).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import expit, log_expit

from ..datasets.tables.cells import write_csv
from ..evaluate.class_names import positive_number
from ..train.metrics import Prediction, per_breast, per_exam
from .maps import Mark

HEADER = "exam patient_id exam_id class probability log_odds laterality views image_path row column adds".split()


@dataclass(frozen=True)
class View:
    """The result for an image.

    Attributes:
        prediction: of the image.
        patient: in the table; "" if only a DICOM header names the patient.
        which: index of the explained class.
        mark: the highest peak of its map, if any.
    """

    prediction: Prediction
    patient: str
    which: int
    mark: Mark | None


def combined(
    views: Sequence[View], classes: Sequence[str], which: int | None, frame: Sequence[str] = ()
) -> list[object]:
    """The columns of `HEADER` for one exam, except its number.

    Args:
        views: of the exam.
        classes: names of the classes.
        which: the class; None takes the positive one of two, else the most probable one.
        frame: a final column frame, if files have several frames.
    """
    # Identified by number, because frames of a file have the same path.
    predictions = [replace(view.prediction, image=str(number)) for number, view in enumerate(views)]
    (exam,) = per_exam(predictions, classes)
    number = which
    if number is None:
        two = exam.exclusive and len(classes) == 2
        number = positive_number(classes) if two else int(np.argmax(exam.log_odds))
    # With several classes, the exam is the breast with the highest expected class, independent of the explained class.
    worse = next(one for one in per_breast(predictions, classes) if one.log_odds[number] == exam.log_odds[number])
    own = [
        view
        for view, one in zip(views, predictions, strict=True)
        if (one.laterality == worse.laterality if worse.laterality else one.image == worse.image)
    ]
    z = exam.log_odds[number]
    slopes = [_log_slope(view.prediction.log_odds[number]) - _log_slope(worse.log_odds[number]) for view in own]
    adds = [
        (view.mark.score * np.exp(slope) / len(own), view)
        for view, slope in zip(own, slopes, strict=True)
        if view.mark is not None and view.which == number
    ]
    row: list[object] = [
        views[0].patient,
        exam.exam,
        classes[number],
        f"{expit(z):.6g}",
        repr(z),
        worse.laterality,
        len(own),
    ]
    if not adds:
        return [*row, "", "", "", "", *("" for _ in frame)]
    most, view = max(adds, key=lambda one: one[0])
    assert view.mark is not None
    mark = view.mark
    own = [f"{mark.row:.2f}", f"{mark.column:.2f}", repr(float(most))]
    return [*row, view.prediction.image, *own, *(view.prediction.reading.get(name, "") for name in frame)]


def _log_slope(log_odds: float) -> float:
    return float(log_expit(log_odds) + log_expit(-log_odds))


def write_exams(
    path: Path, exams: Iterable[Sequence[View]], classes: Sequence[str], which: int | None, frame: Sequence[str] = ()
) -> None:
    """Write ``exams.csv``, with a row for each exam of several views."""
    rows = (combined(group, classes, which, frame) for group in exams)
    write_csv(path, [*HEADER, *frame], ([number, *row] for number, row in enumerate(rows, 1)), "\n")
