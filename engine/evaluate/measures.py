"""All measures of one output (a positive class or a label), with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, brier_score_loss, cohen_kappa_score, confusion_matrix, roc_curve

from ..errors import DataError
from . import odds, roc
from .bootstrap import Resamples, Spread
from .calibration import Binned, in_the_large, reliability, slope_and_intercept
from .cases import Cases
from .checks import Array, classes_of
from .curves import WeightedCurves, ratio

Measure = dict[str, Any]
"""value, or None and why; bootstrap, its 95 % interval [low, high] over patients, and standard_error, or None and why;
exact, an exact interval if there is no bootstrap interval."""


def weighted_pf1(truth: Array, p: Array, of_positives: Array, weights: Array) -> Array:
    """Probabilistic F1 (b,) of rows with weights (b, n); `of_positives` has p of positives, 0 for negatives.

    Positives count with their probability p: precision = sum_pos p / sum p, recall = sum_pos p / positives, and
    F1 = 2 precision recall / (precision + recall) (Yacouby and Axman, 2020; the RSNA screening mammography challenge).
    It is 0 if all positives have probability 0, and NaN without positives.
    """
    positives = weights @ truth
    # 2PR / (P + R) with P = hits / all and R = hits / positives
    hits, below = weights @ of_positives, weights @ p + positives
    return np.divide(2 * hits, below, out=np.full_like(hits, np.nan), where=positives > 0)


def quadratic_kappa(labels: ArrayLike, predicted: ArrayLike, classes: int) -> float | None:
    """Cohen's kappa with quadratic weights of classes (n,); None if all have the same class."""
    labels, predicted = classes_of(labels, classes), classes_of(predicted, classes)
    if labels.shape != predicted.shape:
        raise DataError(f"labels have shape {labels.shape} and predicted classes {predicted.shape}; both must be equal")
    if len(np.union1d(labels, predicted)) < 2:
        return None
    return float(cohen_kappa_score(labels, predicted, weights="quadratic", labels=list(range(classes))))


class Confusion:
    """The confusion matrix of rows (n,) for weighted sums; fastest if rows are sorted by classes."""

    def __init__(self, labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> None:
        cells = labels * classes + predicted
        self._starts = np.flatnonzero(np.append(True, cells[1:] != cells[:-1]))
        self._cells = np.eye(classes * classes)[cells[self._starts]]
        self._cost = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2

    def kappa(self, weights: Array) -> Array:
        """`quadratic_kappa` (b,) of the rows with weights (b, n); NaN where undefined."""
        counts = np.add.reduceat(weights, self._starts, axis=1) @ self._cells
        table = counts.reshape(-1, *self._cost.shape)
        rows = np.maximum(table.sum((1, 2)), 1)[:, None, None]  # no row drawn: undefined below
        chance = table.sum(2)[:, :, None] * table.sum(1)[:, None, :] / rows
        above, below = (table * self._cost).sum((1, 2)), (chance * self._cost).sum((1, 2))
        return 1 - np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


_WITHOUT_VARIANCE = {
    1.0: "the ranking is perfect",
    0.5: "all scores are equal",
    0.0: "every positive ranks below every negative",
}
"""The AUCs whose variance by DeLong is 0, and the cause."""


def _area(scored: _Scored, fewer: int) -> Measure:
    """The area under the ROC curve, and DeLong's interval.

    Args:
        scored: the rows.
        fewer: number of rows of the smaller class.
    """
    found = roc.area_with_interval(scored.truth, scored.ranks)
    if found["delong_standard_error"] is None:
        few = "needs two of each class" if fewer < 2 else f"is 0: {_WITHOUT_VARIANCE[found['value'] or 0.0]}"
        found["delong_why"] = f"DeLong's variance {few}"
    return found


def measure_output(
    cases: Cases, column: int, resamples: Resamples, at: Sequence[float], threshold: float | None = None
) -> dict[str, Any]:
    """AUC, average precision, sensitivity and specificity, and for probabilities pF1 and calibration.

    Args:
        cases: rows; those with a known label count.
        column: of the output.
        resamples: of all rows.
        at: specificities (and sensitivities) at which the other is measured, and the lower limits of partial areas.
        threshold: predefined score from which a row is called positive.
    """
    rows = np.flatnonzero(~np.isnan(cases.truth[:, column]))
    positives = int(cases.truth[rows, column].sum())
    negatives = len(rows) - positives
    found: dict[str, Any] = {"rows": len(rows), "positives": positives, "negatives": negatives}
    if not positives or not negatives:
        found["undefined"] = one_class(len(rows), positives, cases.level)
        return found
    rows = rows[WeightedCurves(cases.truth[rows, column], roc.ranks(cases.scores[rows, column])).order]
    scored = _Scored(cases, column, rows, at, threshold)
    around = resamples.spreads(scored.statistics, rows)
    ones = {name: float(value[0]) for name, value in scored.statistics(np.ones((1, len(rows)))).items()}

    def measure(name: str, value: float | None = None, **more: Any) -> Measure:
        return {"value": ones[name] if value is None else value, **more, **around[name].listed()}

    found["prevalence"] = positives / len(rows)
    found["auc"] = measure("auc") | _area(scored, min(positives, negatives))
    precision = float(average_precision_score(scored.truth, scored.ranks))
    found["average_precision"] = measure("average_precision", precision)
    found["partial_auc"] = [
        {"over": over, "from": rate, **measure(f"partial {over} {rate}"), "raw": measure(f"raw partial {over} {rate}")}
        for over in ("specificity", "sensitivity")
        for rate in at
        if rate < 1
    ]
    found |= _operating_points(scored, at, around)
    if threshold is not None:
        clusters = np.array(cases.clusters, dtype=object)[rows]
        found["at_threshold"] = {
            name: _share(scored, name, ones[name], around[name], clusters) for name in scored.calls
        }
    if cases.probable:
        found["pf1"] = measure("pf1")
        found["brier"] = measure("brier", float(brier_score_loss(scored.truth, scored.p)))
        found["ece"] = measure("ece")
        found["calibration"] = _calibration(scored.truth, scored.p, scored.odds)
    return found


class _Scored:
    """The rows of one output, sorted for `WeightedCurves`, and their resampled statistics."""

    def __init__(
        self, cases: Cases, column: int, rows: NDArray[np.int64], at: Sequence[float], threshold: float | None
    ) -> None:
        self.odds, self.probable, self.at = cases.scores[rows, column], cases.probable, at
        self.truth, self.ranks = cases.truth[rows, column], roc.ranks(self.odds)
        self.p = odds.probabilities(self.odds)
        self.curves = WeightedCurves(self.truth, self.ranks)
        self.calls: dict[str, tuple[Array, Array]] = {}
        """For each fraction at the threshold: the rows of the denominator, and those of the numerator; 1 or 0."""
        if threshold is not None:
            called, positive = self.odds >= threshold, self.truth > 0
            every = np.ones(len(rows), bool)
            shares = {
                "sensitivity": (positive, called),
                "specificity": (~positive, ~called),
                "positive_predictive_value": (called, positive),
                "negative_predictive_value": (~called, ~positive),
                "called": (every, called),
            }
            self.calls = {name: (of * 1.0, (of & hit) * 1.0) for name, (of, hit) in shares.items()}
        if self.probable:
            self._of_positives = self.truth * self.p
            self._binned, self._squares = Binned(self.truth, self.p), (self.p - self.truth) ** 2

    def statistics(self, weights: Array) -> dict[str, Array]:
        """The statistics with intervals, (b,) by name, of the rows with weights (b, n)."""
        drawn = self.curves(weights)
        values = {"auc": drawn.auc(), "average_precision": drawn.average_precision()}
        for rate in self.at:
            values[f"sensitivity {rate}"] = drawn.sensitivity_at(rate)
            values[f"specificity {rate}"] = drawn.specificity_at(rate)
            for over, curves in (("specificity", drawn), ("sensitivity", drawn.mirrored)) if rate < 1 else ():
                area = curves.partial_area(rate)
                values[f"raw partial {over} {rate}"] = area
                values[f"partial {over} {rate}"] = roc.standardised(area, rate)
        for name, (of, hit) in self.calls.items():
            values[name] = ratio(weights @ hit, weights @ of)
        if self.probable:
            all_ = weights.sum(1)
            safe = weights if all_.all() else np.where(all_[:, None] > 0, weights, 1.0)
            values["pf1"] = weighted_pf1(self.truth, self.p, self._of_positives, weights)
            values["brier"] = np.where(all_ > 0, safe @ self._squares / safe.sum(1), np.nan)
            values["ece"] = np.where(all_ > 0, self._binned.expected_error(safe), np.nan)
        return values


def _operating_points(scored: _Scored, at: Sequence[float], around: dict[str, Spread]) -> dict[str, list[Measure]]:
    """Sensitivity at each specificity and vice versa, with the threshold from which rows are called positive."""
    found: dict[str, list[Measure]] = {"sensitivity_at_specificity": [], "specificity_at_sensitivity": []}
    for name, fixed, rate, value, limit in _operating_point_values(scored.truth, scored.odds, scored.probable, at):
        found[f"{name}_at_{fixed}"].append({"at": rate, "value": value, **limit, **around[f"{name} {rate}"].listed()})
    return found


def _operating_point_values(
    truth: Array, scores: Array, probable: bool, at: Sequence[float]
) -> Iterator[tuple[str, str, float, float, dict[str, Any]]]:
    """(measured quantity, fixed quantity, its rate, value, threshold) for each operating point of the ROC curve."""
    false, true, thresholds = roc_curve(truth, roc.ranks(scores), drop_intermediate=False)
    distinct, negatives = np.unique(scores), int((truth == 0).sum())
    for rate in at:
        best = int(np.flatnonzero(1 - false >= rate - 1e-12)[-1])
        enough = int(np.flatnonzero(true >= rate - 1e-12)[0])
        for name, fixed, place, value in (
            ("sensitivity", "specificity", best, float(true[best])),
            ("specificity", "sensitivity", enough, (negatives - round(false[enough] * negatives)) / negatives),
        ):
            rank = thresholds[place]
            score = float(distinct[int(rank)]) if np.isfinite(rank) else None  # None: above all scores
            lower = float(distinct[int(rank) - 1]) if score is not None and rank > 0 else None
            yield name, fixed, rate, value, short_threshold(score, lower, probable)


def threshold_at(cases: Cases, column: int, specificity: float) -> dict[str, Any] | None:
    """The operating point of an output at a specificity, as `short_threshold`; None if there is only one class."""
    known = ~np.isnan(cases.truth[:, column])
    truth, scores = cases.truth[known, column], cases.scores[known, column]
    if not 0 < truth.sum() < len(truth):
        return None
    return next(_operating_point_values(truth, scores, cases.probable, [specificity]))[-1]


def _share(scored: _Scored, name: str, value: float, around: Spread, clusters: NDArray[Any]) -> Measure:
    """A fraction at the threshold; a predictive value without calls is undefined."""
    if np.isnan(value):
        return {"value": None, "why": "not defined: there are no such rows", "bootstrap": None, "standard_error": None}
    found = {"value": value, **around.listed()}
    if around.interval is None and value in (0, 1):
        # Each patient counts as one trial, with any number of rows.
        patients = len(set(clusters[scored.calls[name][0] > 0]))
        sides = binomtest(round(value) * patients, patients).proportion_ci(method="exact")
        found["exact"] = [float(sides.low), float(sides.high)]
    return found


def _calibration(truth: Array, p: Array, z: Array) -> dict[str, Any]:
    curve = reliability(truth, p)
    line = slope_and_intercept(truth, z)
    found: dict[str, Any] = {
        "slope": line[0] if line else None,
        "intercept": line[1] if line else None,
        "in_the_large": in_the_large(truth, z),
        "reliability": {name: values.tolist() for name, values in vars(curve).items()},
    }
    if line is None:
        found["why"] = "the scores part the classes, are all equal, or probabilities are 0 or 1: no finite slope"
    return found


def measure_classes(cases: Cases, resamples: Resamples) -> dict[str, Any]:
    """Quadratically weighted kappa of the most probable class, and the confusion matrix (rows: truth)."""
    rows = np.flatnonzero(cases.labels >= 0)
    rows = rows[np.lexsort((cases.predicted[rows], cases.labels[rows]))]
    labels, predicted = cases.labels[rows], cases.predicted[rows]
    classes = max(2, len(cases.outputs))
    value = quadratic_kappa(labels, predicted, classes) if len(labels) and cases.ordered else None
    found: dict[str, Any] = {"value": value}
    if not cases.ordered:
        found["why"] = "not defined: the class names do not define an order; give it with --classes"
    elif value is None:
        found["why"] = "all rows have one class, and are predicted to have it"
    else:
        confusion = Confusion(labels, predicted, classes)
        found |= resamples.spreads(lambda w: {"kappa": confusion.kappa(w)}, rows)["kappa"].listed()
    table = confusion_matrix(labels, predicted, labels=list(range(classes))) if len(labels) else np.zeros((0, 0))
    return {"kappa": found, "confusion": table.tolist()}


def measure_mean(cases: Cases, resamples: Resamples) -> Measure:
    """The mean AUC over the outputs: each class against the rest (macro), or labels. Undefined AUCs are omitted."""
    value, areas = roc.labelwise_auc(cases.truth, cases.scores)
    used = [column for column, area in enumerate(areas) if area is not None]
    left_out = [cases.outputs[c] for c in range(len(areas)) if c not in used]
    if value is None:
        return {"value": None, "why": "no output has both positives and negatives", "left_out": left_out}
    each = []
    for column in used:
        rows = ~np.isnan(cases.truth[:, column])
        weighted = WeightedCurves(cases.truth[rows, column], cases.scores[rows, column])
        each.append(resamples.values(lambda w, c=weighted: {"auc": c(w).auc()}, rows)["auc"])
    # As for the value: the mean over outputs that are defined in the resample.
    drawn = np.array(each)
    there = ~np.isnan(drawn)
    count = there.sum(0)
    mean = np.where(there, drawn, 0).sum(0) / np.where(count, count, np.nan)
    return {"value": value, **resamples.spread(mean).listed(), "left_out": left_out}


def one_class(rows: int, positives: int, level: str) -> str:
    """The reason why nothing can be measured."""
    if not rows:
        return f"no {level} has a label"
    return f"one class only: all {rows} {level}s are {'positive' if positives else 'negative'}"


def short_threshold(score: float | None, lower: float | None, probable: bool) -> dict[str, Any]:
    """A threshold with few digits that calls rows with at least this score, and no others.

    A rounded probability near 1 may be above the row from which it was taken. So a threshold is a number between this
    row's score and the next lower one, rounded towards the lower score.

    Args:
        score: the lowest called score; None calls no row.
        lower: the highest score that is not called, if any.
        probable: whether scores are log-odds.

    Returns:
        "threshold": a probability (or a score, if scores only rank); None if no row is called, or no probability
        separates the two scores. For probabilities also "log_odds"; None if it is minus infinity, which calls all rows.
    """
    if score is None:
        return {"threshold": None} | ({"log_odds": None} if probable else {})
    below, least_called = -np.inf if lower is None else lower, score

    def parts(value: float) -> bool:
        return (below < value or lower is None) and value <= least_called

    if not probable:
        return {"threshold": _round_down(score, parts)}

    def parts_probabilities(p: float) -> bool:
        is_above = lower is None or float(odds.probabilities(below)) < p
        return parts(float(odds.of_probabilities(p))) and is_above and p <= float(odds.probabilities(least_called))

    probability = _round_down(float(odds.probabilities(score)), parts_probabilities)
    if score == np.inf:  # any number above the next score is equivalent
        score = below + 1 if np.isfinite(below) else 0.0
    return {"threshold": probability, "log_odds": _round_down(score, parts) if np.isfinite(score) else None}


def _round_down(value: float, fits: Callable[[float], bool]) -> float | None:
    """The value rounded down to the fewest digits, at least four, that fit."""
    for digits in range(4, 18):
        rounded = float(Context(prec=digits, rounding=ROUND_FLOOR).create_decimal(Decimal(value)))
        if fits(rounded):
            return rounded
    return value if fits(value) else None
