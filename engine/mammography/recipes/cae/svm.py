"""Support vector machines on features, and their measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from ....errors import DataError
from ....evaluate.roc import macro_auc


def fit_svm(
    features: NDArray[Any],
    labels: ArrayLike,
    patients: ArrayLike,
    *,
    kernel: str,
    c: Sequence[float],
    folds: int = 5,
    standardise: bool = True,
) -> Any:
    """Fit a scikit-learn classifier on features (n, d); with several C, select the best in cross-validation by patient.

    Raises:
        DataError: images have only one class, in all or in a fold.
    """
    truth = np.asarray(labels)
    if len(np.unique(truth)) < 2:
        raise DataError("the training images have only one class; an SVM needs at least two classes")
    steps = [StandardScaler()] if standardise else []
    model = make_pipeline(*steps, SVC(kernel=kernel, C=c[0]))
    if len(c) == 1:
        return model.fit(features, truth)
    cut = StratifiedGroupKFold(folds)
    groups = np.asarray(patients)
    if len(np.unique(groups)) < folds:
        raise DataError(
            f"{len(np.unique(groups))} patients cannot be split into {folds} folds; lower folds, or use one c"
        )
    cuts = list(cut.split(features, truth, groups))
    for number, (train, _) in enumerate(cuts):
        if len(np.unique(truth[train])) < 2:
            raise DataError(
                f"fold {number + 1} of {folds} has training images of only one class; lower folds, or use one c"
            )
    search = GridSearchCV(model, {"svc__C": list(c)}, cv=cuts, scoring="accuracy", n_jobs=1)
    return search.fit(features, truth)


def measure_svm(model: Any, features: NDArray[Any], labels: ArrayLike) -> dict[str, Any]:
    """Return accuracy, macro_f1, auc (macro over the classes, None with one class) and c."""
    truth = np.asarray(labels)
    predicted = model.predict(features)
    count = int(max(truth.max(), model.classes_.max())) + 1
    best = getattr(model, "best_estimator_", model)
    return {
        **measure_scores(truth, predicted, svm_scores(model, features, count)),
        "c": float(best.named_steps["svc"].C),
    }


def measure_scores(truth: ArrayLike, predicted: ArrayLike, scores: NDArray[Any]) -> dict[str, Any]:
    """Return accuracy, macro_f1 and auc of class numbers (n,) and of scores (n, classes)."""
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
        "auc": macro_auc(np.asarray(truth), scores),
    }


def svm_scores(model: Any, features: NDArray[Any], count: int) -> NDArray[np.float64]:
    """Return scores (n, count), a column per class number; classes that were not in training get the lowest score."""
    decision, classes = model.decision_function(features), model.classes_
    if decision.ndim == 1:
        decision = np.stack([-decision, decision], 1)
    scores = np.full((len(decision), count), decision.min() - 1.0)
    scores[:, classes] = decision
    return scores
