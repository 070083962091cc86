"""Everything that one output (a positive class, a label) is measured by, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, brier_score_loss, cohen_kappa_score, confusion_matrix, roc_curve

from . import calibration, curves, odds, roc
from .bootstrap import Resamples, interval
from .cases import Cases

Array = NDArray[np.float64]
Measure = dict[str, Any]
"""value, or None and why; and, where there are any, delong and bootstrap: 95 % intervals [low, high] or None."""


def pf1(labels: ArrayLike, probabilities: ArrayLike, weights: Array | None = None) -> Array:
    """Probabilistic F1 (b,) of rows (n,) with weights (b, n), by default one of ones.

    Positives count with their probability p: precision = sum_pos p / sum p, recall = sum_pos p / positives, and
    F1 = 2 precision recall / (precision + recall) (Yacouby and Axman, 2020; the RSNA screening mammography challenge).
    0 where no positive has any probability, NaN without positives.
    """
    truth, p = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    weights = np.ones((1, len(p))) if weights is None else weights
    hits, positives = weights @ (truth * p), weights @ truth
    # 2PR / (P + R) with P = hits / all and R = hits / positives
    below = weights @ p + positives
    return np.divide(2 * hits, below, out=np.full_like(hits, np.nan), where=positives > 0)


def quadratic_kappa(labels: ArrayLike, predicted: ArrayLike, classes: int) -> float | None:
    """Cohen's kappa with quadratic weights of classes (n,); None where all have one and the same class."""
    if len(np.union1d(labels, predicted)) < 2:
        return None
    return float(cohen_kappa_score(labels, predicted, weights="quadratic", labels=list(range(classes))))


def weighted_kappa(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int, weights: Array) -> Array:
    """`quadratic_kappa` (b,) of rows with weights (b, n); NaN where not defined."""
    cells = weights @ np.eye(classes * classes)[labels * classes + predicted]
    table = cells.reshape(-1, classes, classes)
    rows = np.maximum(table.sum((1, 2)), 1)[:, None, None]  # none drawn: not defined below
    chance = table.sum(2)[:, :, None] * table.sum(1)[:, None, :] / rows
    cost = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    above, below = (table * cost).sum((1, 2)), (chance * cost).sum((1, 2))
    return 1 - np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def measure_output(
    cases: Cases, column: int, resamples: Resamples, at: Sequence[float], threshold: float | None = None
) -> dict[str, Any]:
    """AUC, average precision, sensitivity and specificity, and, of probabilities, pF1 and calibration.

    Args:
        cases: of which the rows whose label is known count; the resamples are of all of them.
        column: of the output.
        at: specificities (and sensitivities) at which the other one is told.
        threshold: score from which on a row is called, if one was fixed before.
    """
    rows = ~np.isnan(cases.truth[:, column])
    truth, scores = cases.truth[rows, column], roc.ranks(cases.scores[rows, column])
    odds_, p = cases.scores[rows, column], odds.probabilities(cases.scores[rows, column])
    positives = int(truth.sum())
    negatives = len(truth) - positives
    found: dict[str, Any] = {"rows": len(truth), "positives": positives, "negatives": negatives}
    if not positives or not negatives:
        found["undefined"] = one_class(len(truth), positives, cases.level)
        return found
    found["prevalence"] = positives / len(truth)
    weighted = curves.WeightedCurves(truth, scores)

    def statistics(weights: Array) -> dict[str, Array]:
        true, false = weighted.counts(weights)
        values = {"auc": curves.auc(true, false), "average_precision": curves.average_precision(true, false)}
        for rate in at:
            values[f"sensitivity {rate}"] = curves.sensitivity_at(true, false, rate)
            values[f"specificity {rate}"] = curves.specificity_at(true, false, rate)
        if cases.probable:
            drawn = weights.sum(1) > 0
            safe = np.where(drawn[:, None], weights, 1.0)
            values["pf1"] = pf1(truth, p, weights)
            values["brier"] = np.where(drawn, safe @ (p - truth) ** 2 / safe.sum(1), np.nan)
            values["ece"] = np.where(drawn, calibration.expected_error(truth, p, safe), np.nan)
        return values

    around = resamples.intervals(statistics, rows)

    def with_interval(name: str, value: float, **more: Any) -> Measure:
        return {"value": value, **more, "bootstrap": _listed(around[name])}

    area = roc.auc(truth, scores)
    assert area is not None
    found["auc"] = with_interval("auc", area, delong=_listed(roc.delong_interval(truth, scores)))
    if found["auc"]["delong"] is None:
        found["auc"]["why"] = "DeLong's variance needs two of each class and is 0 where the ranking is perfect"
    found["average_precision"] = with_interval("average_precision", float(average_precision_score(truth, scores)))
    found |= _operating_points(truth, scores, odds_, at, around, cases.probable)
    if threshold is not None:
        found["at_threshold"] = _calls(truth, odds_ >= threshold, resamples, rows)
    if cases.probable:
        found["pf1"] = with_interval("pf1", float(pf1(truth, p)[0]))
        found["brier"] = with_interval("brier", float(brier_score_loss(truth, p)))
        found["ece"] = with_interval("ece", float(calibration.expected_error(truth, p)[0]))
        found["calibration"] = _calibration(truth, p, odds_)
    return found


def _operating_points(
    truth: Array, scores: Array, given: Array, at: Sequence[float], around: dict[str, Any], probable: bool
) -> dict[str, list[Measure]]:
    """Sensitivity at each specificity and back, with the threshold: rows with that score or more are called."""
    false, true, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    distinct = np.unique(given)
    rows: dict[str, list[Measure]] = {"sensitivity_at_specificity": [], "specificity_at_sensitivity": []}
    for rate in at:
        best = int(np.flatnonzero(1 - false >= rate - 1e-12)[-1])
        enough = int(np.flatnonzero(true >= rate - 1e-12)[0])
        for name, place, value in (
            ("sensitivity", best, float(true[best])),
            ("specificity", enough, float(1 - false[enough])),
        ):
            rank = thresholds[place]
            score = float(distinct[int(rank)]) if np.isfinite(rank) else None  # None: above all scores
            limit: dict[str, float | None] = {"threshold": score}
            if probable:
                finite = score is not None and np.isfinite(score)  # that of probability 0 or 1 is not
                probability = None if score is None else float(odds.probabilities(score))
                limit = {"threshold": probability, "log_odds": score if finite else None}
            key = "sensitivity_at_specificity" if name == "sensitivity" else "specificity_at_sensitivity"
            rows[key].append({"at": rate, "value": value, **limit, "bootstrap": _listed(around[f"{name} {rate}"])})
    return rows


def _calls(truth: Array, called: NDArray[np.bool_], resamples: Resamples, rows: NDArray[np.bool_]) -> dict[str, Any]:
    """What comes of calling these rows; a predictive value of no calls is not defined."""

    def statistics(weights: Array) -> dict[str, Array]:
        hits, alarms = weights @ (called * truth), weights @ (called * (1 - truth))
        positives, negatives = weights @ truth, weights @ (1 - truth)
        above = {
            "sensitivity": (hits, positives),
            "specificity": (negatives - alarms, negatives),
            "positive_predictive_value": (hits, hits + alarms),
            "negative_predictive_value": (negatives - alarms, positives + negatives - hits - alarms),
            "called": (hits + alarms, positives + negatives),
        }
        return {name: np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0) for name, (a, b) in above.items()}

    around = resamples.intervals(statistics, rows)
    values = {name: float(value[0]) for name, value in statistics(np.ones((1, len(truth)))).items()}
    return {
        name: {"value": None if np.isnan(value) else value, "bootstrap": _listed(around[name])}
        for name, value in values.items()
    }


def _calibration(truth: Array, p: Array, z: Array) -> dict[str, Any]:
    curve = calibration.reliability(truth, p)
    line = calibration.slope_and_intercept(truth, z)
    found: dict[str, Any] = {
        "slope": line[0] if line else None,
        "intercept": line[1] if line else None,
        "in_the_large": calibration.in_the_large(truth, z),
        "reliability": {name: values.tolist() for name, values in vars(curve).items()},
    }
    if line is None:
        found["why"] = "the scores part the classes, are all equal, or probabilities are 0 or 1: no finite slope"
    return found


def measure_classes(cases: Cases, resamples: Resamples) -> dict[str, Any]:
    """Quadratic weighted kappa of the most probable class, with the confusion matrix (rows: truth)."""
    rows = cases.labels >= 0
    labels, predicted = cases.labels[rows], cases.predicted[rows]
    classes = max(2, len(cases.outputs))
    value = quadratic_kappa(labels, predicted, classes) if len(labels) else None
    found: dict[str, Any] = {"value": value}
    if value is None:
        found["why"] = "all rows have one class, and are predicted to have it"
    else:
        values = resamples.values(lambda w: {"kappa": weighted_kappa(labels, predicted, classes, w)}, rows)
        found["bootstrap"] = _listed(interval(values["kappa"]))
    table = confusion_matrix(labels, predicted, labels=list(range(classes))) if len(labels) else np.zeros((0, 0))
    return {"kappa": found, "confusion": table.tolist()}


def measure_mean(cases: Cases, resamples: Resamples) -> Measure:
    """The mean AUC over the outputs: classes each against the rest (macro), or labels. Undefined ones are omitted."""
    value, areas = roc.labelwise_auc(cases.truth, cases.scores)
    used = [column for column, area in enumerate(areas) if area is not None]
    left_out = [cases.outputs[c] for c in range(len(areas)) if c not in used]
    if value is None:
        return {"value": None, "why": "no output has both positives and negatives", "left_out": left_out}
    each = []
    for column in used:
        rows = ~np.isnan(cases.truth[:, column])
        weighted = curves.WeightedCurves(cases.truth[rows, column], cases.scores[rows, column])
        each.append(resamples.values(lambda w, c=weighted: {"auc": curves.auc(*c.counts(w))}, rows)["auc"])
    # As in the value: the mean over those that the resample defines.
    drawn = np.array(each)
    there = ~np.isnan(drawn)
    count = there.sum(0)
    mean = np.where(there, drawn, 0).sum(0) / np.where(count, count, np.nan)
    return {"value": value, "bootstrap": _listed(interval(mean)), "left_out": left_out}


def one_class(rows: int, positives: int, level: str) -> str:
    """Why nothing can be measured."""
    if not rows:
        return f"no {level} has a label"
    return f"one class only: all {rows} {level}s are {'positive' if positives else 'negative'}"


def _listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)
