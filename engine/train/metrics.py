"""Predictions of images and breasts, and how well they rank: what a run is followed by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..datasets.tables import READING
from ..datasets.unknown_views import unplaced
from ..evaluate import odds as of
from ..evaluate.cases import Cases, Level
from ..evaluate.class_names import positive_number


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image, or of an exam of several views that are one sample.

    ``log_odds`` are those of each class against all others, float64: large logits keep their order, which probabilities
    near 1 do not. ``patient``, ``exam`` and ``laterality`` name the breast; ``laterality`` is "" where it is not known,
    and then an image stands for itself. ``split`` is what the image was in the training; "" where that is not known.
    ``exclusive`` says that an image is of exactly one of the classes; otherwise each is a label of its own, or, with
    ``numbers``, a number, which then stands in ``log_odds``. ``truth`` is what is known of these, NaN where it is not.
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
    """What the network gave, where views are combined by that."""
    reading: Mapping[str, str] = field(default_factory=dict)
    """Which pixels of the file it is of, see `reading_of`."""

    @property
    def known(self) -> bool:
        """Whether anything is known of the truth."""
        return self.label is not None if self.exclusive else self.truth is not None

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Of each class; those of classes that exclude each other add up to 1."""
        return tuple(of.probabilities(self.log_odds).tolist())


def as_cases(predictions: Sequence[Prediction], classes: Sequence[str]) -> Cases:
    """Predictions as what `gigamorph.engine.evaluate` measures; of two classes the positive one (`positive_number`)."""
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
    """The mean probability of the views of each breast (patient, exam, side); its label is the highest of its views'.

    Images without patient or laterality stay single. The order is that of each breast's first image. Of two classes the
    highest one is the positive one by its name (`positive_number`).
    """
    return _grouped(predictions, classes, "breast")


def per_exam(predictions: Sequence[Prediction], classes: Sequence[str]) -> list[Prediction]:
    """The views of each exam (patient, exam) as one: the highest of its breasts, each the mean of its views.

    Of two classes the highest breast is that of the positive one. Images without patient stay single.
    """
    return _grouped(predictions, classes, "exam")


def _grouped(predictions: Sequence[Prediction], classes: Sequence[str], level: Level) -> list[Prediction]:
    if not predictions:
        return []
    breasts = as_cases(predictions, classes).at(level)
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
"""Measures of `scores` that are better when they are smaller."""
SHOWN = {"auc_image": "AUC", "mae_image": "MAE", "auc_exam": "AUC", "mae_exam": "MAE", "dice": "Dice"}


def scores(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, float | int | None]:
    """Measures per image and per breast with the counts, over the predictions whose truth is known; of exams per exam.

    AUC (of several classes or labels the mean); of numbers the mean absolute error (mae). None where not defined.
    """
    known = [p for p in predictions if p.known]
    name, measure = ("mae", mae_of) if any(p.numbers for p in known) else ("auc", auc_of)
    if predictions and predictions[0].level == "exam":
        return {"exams": len(known), f"{name}_exam": measure(known)}
    left_out = {
        n
        for values in ([p.exam for p in known], [p.laterality for p in known])
        for n in unplaced([p.patient for p in known], values)
    }
    breasts = per_breast([p for n, p in enumerate(known) if n not in left_out], classes)
    return {
        "images": len(known),
        f"{name}_image": measure(known),
        "breasts": len(breasts),
        f"{name}_breast": measure(breasts),
    }


def auc_of(predictions: Sequence[Prediction]) -> float | None:
    """AUC of predictions, by their labels; None where it is not defined."""
    if not predictions:
        return None
    values = np.array([p.log_odds for p in predictions], np.float64)
    from ..evaluate.roc import labelwise_auc, macro_auc  # whose libraries take a second, and a prediction needs none

    if not predictions[0].exclusive:
        return labelwise_auc([p.truth or [np.nan] * values.shape[1] for p in predictions], values)[0]
    return macro_auc([p.label for p in predictions if p.label is not None], values)


def mae_of(predictions: Sequence[Prediction]) -> float | None:
    """Mean absolute error of numbers, the mean of those of each; None without any."""
    if not predictions:
        return None
    truth = np.array([p.truth for p in predictions], np.float64)
    return float(np.nanmean(np.nanmean(np.abs(truth - [p.log_odds for p in predictions]), 0)))
