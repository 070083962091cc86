"""Predictions of images and breasts, and how well they rank: what a run is followed by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluate import Cases, macro_auc
from ..evaluate import odds as of


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image.

    ``log_odds`` are those of each class against all others, float64: large logits keep their order, which probabilities
    near 1 do not. ``patient``, ``exam`` and ``laterality`` name the breast; ``laterality`` is "" where it is not known,
    and then an image stands for itself. ``split`` is what the image was in the training; "" where that is not known.
    """

    image: str
    log_odds: tuple[float, ...]
    label: int | None = None
    patient: str = ""
    laterality: str = ""
    view: str = ""
    exam: str = ""
    split: str = ""

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The softmax of the network's outputs, one per class."""
        return tuple(of.probabilities(self.log_odds).tolist())


def as_cases(predictions: Sequence[Prediction], classes: Sequence[str]) -> Cases:
    """Predictions as what `gigamorph.engine.evaluate` measures; of two classes the second against the first."""
    labels = np.array([-1 if p.label is None else p.label for p in predictions])
    truth = np.where((labels < 0)[:, None], np.nan, np.eye(len(classes))[labels])
    scores = np.array([p.log_odds for p in predictions], np.float64)
    binary = len(classes) == 2
    return Cases(
        outputs=tuple(classes[1:] if binary else classes),
        truth=truth[:, 1:] if binary else truth,
        scores=scores[:, 1:] if binary else scores,
        names=tuple(p.image for p in predictions),
        patients=tuple(p.patient for p in predictions),
        exams=tuple(p.exam for p in predictions),
        sides=tuple(p.laterality for p in predictions),
        kind="binary" if binary else "classes",
        columns={"view": tuple(p.view for p in predictions), "split": tuple(p.split for p in predictions)},
    )


def per_breast(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The mean probability of the views of each breast (patient, exam, side); its label is the highest of its views'.

    Images without patient or laterality stay single. The order is that of each breast's first image.
    """
    if not predictions:
        return []
    classes = [str(number) for number in range(len(predictions[0].log_odds))]
    breasts = as_cases(predictions, classes).at("breast")
    scores = breasts.scores if breasts.kind == "classes" else np.concatenate([-breasts.scores, breasts.scores], 1)
    return [
        Prediction(
            image=breasts.names[i],
            log_odds=tuple(scores[i].tolist()),
            label=None if label < 0 else int(label),
            patient=breasts.patients[i],
            laterality=breasts.sides[i],
            view=breasts.columns["view"][i],
            exam=breasts.exams[i],
            split=breasts.columns["split"][i],
        )
        for i, label in enumerate(breasts.labels)
    ]


def scores(predictions: Sequence[Prediction]) -> dict[str, float | int | None]:
    """AUC per image and per breast with the counts, over the predictions that have a label."""
    labelled = [p for p in predictions if p.label is not None]
    breasts = per_breast(labelled)
    return {
        "images": len(labelled),
        "auc_image": auc_of(labelled),
        "breasts": len(breasts),
        "auc_breast": auc_of(breasts),
    }


def auc_of(predictions: Sequence[Prediction]) -> float | None:
    """AUC of predictions, by their labels; None where it is not defined."""
    if not predictions:
        return None
    labels = [p.label for p in predictions if p.label is not None]
    return macro_auc(labels, np.array([p.log_odds for p in predictions], np.float64))
