"""Area under the ROC curve per image and per breast, in float64 through scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image.

    ``probabilities`` are the softmax of the outputs, one per class, float64. ``patient`` and ``laterality`` name the
    breast; ``laterality`` is "" where it is not known, and then an image stands for itself.
    """

    image: str
    probabilities: tuple[float, ...]
    label: int | None = None
    patient: str = ""
    laterality: str = ""
    view: str = ""


def auc(labels: Sequence[int], probabilities: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve; the mean over the classes, each against the rest, if there are more than two.

    Args:
        labels: class of each row.
        probabilities: (images, classes), float64.

    Returns:
        None where it is not defined: fewer than two of the classes occur.
    """
    truth: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
    if len(np.unique(truth)) < 2:
        return None
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(truth, probabilities[:, 1]))
    present = [c for c in range(probabilities.shape[1]) if 0 < np.count_nonzero(truth == c) < len(truth)]
    return float(np.mean([roc_auc_score(truth == c, probabilities[:, c]) for c in present]))


def per_breast(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The mean of the views of each breast (patient and laterality); a breast's label is the highest of its views'.

    Images without patient or laterality stay single. The order is that of each breast's first image.
    """
    groups: dict[tuple[str, str, str], list[Prediction]] = {}
    for p in predictions:
        known = p.patient and p.laterality
        groups.setdefault((p.patient, p.laterality, "" if known else p.image), []).append(p)
    breasts = []
    for (patient, laterality, image), views in groups.items():
        mean: list[float] = np.array([v.probabilities for v in views], dtype=np.float64).mean(0).tolist()
        labels = [v.label for v in views if v.label is not None]
        breasts.append(
            Prediction(
                image=image or f"{patient}_{laterality}",
                probabilities=tuple(mean),
                label=max(labels) if labels else None,
                patient=patient,
                laterality=laterality,
                view="+".join(sorted(v.view for v in views if v.view)),
            )
        )
    return breasts


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
    return auc(labels, np.array([p.probabilities for p in predictions], dtype=np.float64))
