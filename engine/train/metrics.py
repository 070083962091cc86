"""Predictions of images, breasts and exams, and the validation measures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..datasets.tables import READING
from ..evaluate import odds as of
from ..evaluate.cases import Cases, Level
from ..evaluate.class_names import positive_number


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or for an exam whose views are one sample.

    Attributes:
        image: name of the image or exam.
        log_odds: of each class against all others, float64, because probabilities near 1 lose their order; or the
            predicted numbers.
        label: the true class; None if unknown.
        patient, exam, laterality: identify the breast; "" if unknown. An image of unknown laterality is not grouped.
        view: of the breast.
        split: the image's split in the training; "" if unknown.
        exclusive: whether an image has exactly one of the classes; otherwise each class is a separate label.
        numbers: whether numbers are predicted.
        truth: true labels or numbers if not exclusive, NaN where unknown.
        level: "image" or "exam".
    """

    image: str
    log_odds: tuple[float, ...]
    label: int | None = None
    patient: str = ""
    laterality: str = ""
    view: str = ""
    exam: str = ""
    split: str = ""
    exclusive: bool = True
    numbers: bool = False
    truth: tuple[float, ...] | None = None
    level: Level = "image"
    row: tuple[float, ...] = ()
    """The network's output, if views are combined from outputs."""
    reading: Mapping[str, str] = field(default_factory=dict)
    """The pixels of the file that were read, see `reading_of`."""

    @property
    def known(self) -> bool:
        """Whether the truth is at least partly known."""
        return self.label is not None if self.exclusive else self.truth is not None

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The probability of each class; those of exclusive classes sum to 1."""
        return tuple(of.probabilities(self.log_odds).tolist())


def as_cases(predictions: Sequence[Prediction], classes: Sequence[str]) -> Cases:
    """Predictions as cases for `gigamorph.engine.evaluate`; of two classes only the positive (`positive_number`)."""
    exclusive = all(p.exclusive for p in predictions)
    labels = np.array([-1 if p.label is None or not exclusive else p.label for p in predictions])
    truth = np.where((labels < 0)[:, None], np.nan, np.eye(len(classes))[labels])
    for row, p in enumerate(predictions):
        if not exclusive and p.truth is not None:
            truth[row] = p.truth
    numbers = any(p.numbers for p in predictions)
    scores = np.array([p.log_odds for p in predictions], np.float64)
    binary = exclusive and len(classes) == 2
    used = [positive_number(classes)] if binary else list(range(len(classes)))
    reading = [name for name in READING if any(name in p.reading for p in predictions)]
    return Cases(
        outputs=tuple(classes[n] for n in used),
        truth=truth[:, used],
        scores=scores[:, used],
        names=tuple(p.image for p in predictions),
        patients=tuple(p.patient for p in predictions),
        exams=tuple(p.exam for p in predictions),
        sides=tuple(p.laterality for p in predictions),
        kind="binary" if binary else "classes" if exclusive else "numbers" if numbers else "labels",
        level=predictions[0].level if predictions else "image",
        probable=not numbers,
        columns={
            "view": tuple(p.view for p in predictions),
            "split": tuple(p.split for p in predictions),
            **{name: tuple(p.reading.get(name, "") for p in predictions) for name in reading},
        },
    )


def per_breast(predictions: Sequence[Prediction], classes: Sequence[str]) -> list[Prediction]:
    """The mean probability of the views of each breast (patient, exam, side); its label is the highest of its views.

    Images without patient or laterality remain single. Breasts are ordered by their first image. Of two classes the
    highest is the positive one by its name (`positive_number`).
    """
    return _grouped(predictions, classes, "breast")


def per_exam(predictions: Sequence[Prediction], classes: Sequence[str]) -> list[Prediction]:
    """The prediction of each exam (patient, exam): the maximum over its breasts, each the mean of its views.

    Of two classes the maximum is that of the positive one. Images without patient remain single.
    """
    return _grouped(predictions, classes, "exam")


def _grouped(
    predictions: Sequence[Prediction], classes: Sequence[str], level: Level, placed: bool = False
) -> list[Prediction]:
    """Breasts or exams; with `placed`, without the images that are in none."""
    if not predictions:
        return []
    cases = as_cases(predictions, classes)
    breasts = (cases.placed(level) if placed else cases).at(level)
    scores, labels = breasts.scores, breasts.labels
    if breasts.kind == "binary":
        scores = np.concatenate([-scores, scores], 1)
        if positive_number(classes) == 0:
            scores, labels = scores[:, ::-1], np.where(labels < 0, labels, 1 - labels)
    exclusive = breasts.kind in ("binary", "classes")
    return [
        Prediction(
            image=breasts.names[i],
            log_odds=tuple(scores[i].tolist()),
            label=None if label < 0 or not exclusive else int(label),
            patient=breasts.patients[i],
            laterality=breasts.sides[i],
            view=breasts.columns["view"][i],
            exam=breasts.exams[i],
            split=breasts.columns["split"][i],
            exclusive=exclusive,
            numbers=breasts.kind == "numbers",
            truth=None if exclusive or np.isnan(breasts.truth[i]).all() else tuple(breasts.truth[i].tolist()),
        )
        for i, label in enumerate(labels)
    ]


COUNTS = ("images", "breasts", "exams")
SMALLER = ("mae_image", "mae_breast", "mae_exam")
"""Measures of `scores` for which smaller is better."""
SHOWN = {"auc_image": "AUC", "mae_image": "MAE", "auc_exam": "AUC", "mae_exam": "MAE", "dice": "Dice"}


def scores(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, float | int | None]:
    """Measures and counts of the predictions whose truth is known, per image and per breast, or per exam.

    The measure is the AUC (the mean over classes or labels), or for numbers the mean absolute error (mae). None if
    undefined.
    """
    known = [p for p in predictions if p.known]
    name, measure = ("mae", mae_of) if any(p.numbers for p in known) else ("auc", auc_of)
    if predictions and predictions[0].level == "exam":
        return {"exams": len(known), f"{name}_exam": measure(known)}
    breasts = _grouped(known, classes, "breast", placed=True)
    return {
        "images": len(known),
        f"{name}_image": measure(known),
        "breasts": len(breasts),
        f"{name}_breast": measure(breasts),
    }


def auc_of(predictions: Sequence[Prediction]) -> float | None:
    """AUC of predictions; None if undefined."""
    if not predictions:
        return None
    values = np.array([p.log_odds for p in predictions], np.float64)
    from ..evaluate.roc import labelwise_auc, macro_auc  # a second of imports that predictions do not need

    if not predictions[0].exclusive:
        return labelwise_auc([p.truth or [np.nan] * values.shape[1] for p in predictions], values)[0]
    return macro_auc([p.label for p in predictions if p.label is not None], values)


def mae_of(predictions: Sequence[Prediction]) -> float | None:
    """Mean absolute error, averaged over the numbers; None without predictions."""
    if not predictions:
        return None
    truth = np.array([p.truth for p in predictions], np.float64)
    return float(np.nanmean(np.nanmean(np.abs(truth - [p.log_odds for p in predictions]), 0)))
