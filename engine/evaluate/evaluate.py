"""The complete evaluation, which ``metrics.json`` contains and the report shows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..datasets.tables.values import number
from ..errors import DataError
from ..versions import versions
from . import froc, odds, roc
from .bootstrap import Resamples
from .cases import LEVELS, Cases, Level, counted_patients
from .compare import UnpairedError, compare
from .curves import WeightedCurves
from .measures import measure_classes, measure_mean, measure_output, one_class, threshold_at

RATES = (0.8, 0.9, 0.95)
_FEW = 12  # numbers with more distinct values are grouped into bands
POINTS = ("sensitivity_at_specificity", "specificity_at_sensitivity")


@dataclass(frozen=True)
class Settings:
    """The settings of an evaluation.

    Attributes:
        levels: levels to measure; None takes images, and breasts and exams if they are fewer.
        rates: specificities at which the sensitivity is measured, and vice versa.
        threshold: predefined probability (or score, if scores only rank) from which a row is called positive.
        by: columns whose values form subgroups.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        false_marks: false marks per image at which FROC's sensitivity is measured.
        iou: for FROC, the minimum intersection over union of a mark's box and the lesion's box that it finds; None
            uses the marks' centres, which must be in the lesion's box.
        log_odds: the threshold as log-odds, if probabilities are too close to 0 or 1 to be distinguished.
    """

    levels: tuple[Level, ...] | None = None
    rates: tuple[float, ...] = RATES
    threshold: float | None = None
    by: tuple[str, ...] = ()
    resamples: int = 2000
    seed: int = 0
    false_marks: tuple[float, ...] = froc.RATES
    iou: float | None = None
    log_odds: float | None = None


def evaluate(
    images: Cases,
    settings: Settings | None = None,
    *,
    other: Cases | None = None,
    marked: Sequence[froc.Marked] | None = None,
    validation: Cases | None = None,
) -> dict[str, Any]:
    """Measure predictions at each level; returns plain values for JSON.

    Args:
        images: with scores; images without a label count if another view of their breast has one.
        settings: of the evaluation.
        other: another prediction of the same images, to compare.
        marked: marks and lesions, for FROC.
        validation: images of split val, whose threshold at the middle rate is applied to other splits if none is
            predefined. Only rows of split val, or without a split, have thresholds from their own scores.

    Raises:
        DataError: if nothing can be measured at any level because all rows have one class or none has a label; or for
            unknown columns.
    """
    if images.kind == "numbers":
        raise DataError("these are numbers, not classes or labels; use numbers.evaluate_numbers")
    settings = settings or Settings()
    found: dict[str, Any] = {
        "kind": images.kind,
        "outputs": list(images.outputs),
        **({"ordered": images.ordered} if images.kind == "classes" else {}),
        "resamples": settings.resamples,
        "seed": settings.seed,
        "levels": {},
    }
    of_level = at_levels(images, settings.levels)
    for level, cases in of_level.items():
        labelled = cases.labelled()
        chosen = _Thresholds(labelled, settings, None if validation is None else at_level(validation, level))
        found["levels"][level] = _at_level(labelled, settings, chosen) | {
            "without_label": len(cases) - len(labelled),
            "left_out": len(images) - len(images.placed(level)),
        }
        if other is not None:
            found["levels"][level]["comparison"] = _compared(labelled, other, settings)
    compared = [one["comparison"] for one in found["levels"].values() if "comparison" in one]
    if compared and all("unpaired" in one for one in compared):
        raise DataError(compared[0]["unpaired"])
    of_all = [output for one in found["levels"].values() for output in one["outputs"].values()]
    if all("undefined" in output for output in of_all):
        raise DataError(f"{of_all[0]['undefined']}; nothing can be measured")
    if marked is not None:
        options = {"rates": settings.false_marks, "iou": settings.iou}
        found["froc"] = froc.measure(marked, count=settings.resamples, seed=settings.seed, **options)
    found["versions"] = versions("gigamorph", "numpy", "scipy", "scikit-learn")
    return found


def at_level(images: Cases, level: Level) -> Cases:
    """The rows at a level, without rows that cannot be assigned to a breast or exam."""
    return images.placed(level).at(level)


def at_levels(images: Cases, levels: Sequence[Level] | None = None) -> dict[Level, Cases]:
    """The rows at each level; None takes their own level, and higher levels with fewer rows."""
    if levels is not None:
        return {level: at_level(images, level) for level in levels}
    if images.level != "image":
        return {images.level: images}
    breasts, exams = at_level(images, "breast"), at_level(images, "exam")
    found: dict[Level, Cases] = {"image": images}
    if len(breasts) < len(images.placed("breast")):
        found["breast"] = breasts
    if len(exams) < len(breasts):
        found["exam"] = exams
    return found


def _compared(cases: Cases, other: Cases, settings: Settings) -> dict[str, Any]:
    """The comparison at a level, or the reason why its rows cannot be paired."""
    if other.level not in ("image", cases.level):
        return {"unpaired": f"the other prediction is of {other.level}s, and has no {cases.level}s"}
    try:
        return compare(cases, at_level(other, cases.level), count=settings.resamples, seed=settings.seed)
    except UnpairedError as error:
        return {"unpaired": str(error)}


class _Thresholds:
    """The thresholds of the rows of a level: predefined, or measured on validation rows."""

    def __init__(self, cases: Cases, settings: Settings, validation: Cases | None) -> None:
        self._cases, self._settings = cases, settings
        self.own = set(cases.columns.get("split", ())) <= {"", "val"}
        """Whether thresholds may be measured on the evaluated rows."""
        self._validation = None if self.own else validation

    def of(self, column: int) -> dict[str, Any] | None:
        """threshold and log_odds as in `measures.short_threshold`, with the source under "from"; None without one."""
        settings = self._settings
        if settings.threshold is not None or settings.log_odds is not None:
            return {"threshold": settings.threshold, "log_odds": settings.log_odds, "from": "given"}
        if self._validation is None or not settings.rates:
            return None
        rate = settings.rates[len(settings.rates) // 2]
        found = threshold_at(self._validation, column, rate)
        return None if found is None else {**found, "from": f"split val, specificity {rate:g}"}

    def score(self, limit: dict[str, Any] | None) -> float | None:
        """The score of a result of `of`; None also if no row is called."""
        given = limit or {"threshold": None}
        return score_of(self._cases, Settings(threshold=given["threshold"], log_odds=given.get("log_odds")))


def _at_level(cases: Cases, settings: Settings, chosen: _Thresholds) -> dict[str, Any]:
    resamples = Resamples(cases.clusters, settings.resamples, settings.seed)
    outputs = {}
    for column, name in enumerate(cases.outputs):
        limit = chosen.of(column)
        outputs[name] = measure_output(cases, column, resamples, settings.rates, chosen.score(limit))
        if limit is not None:
            outputs[name]["threshold"] = limit
        if not chosen.own:
            for point in (p for key in POINTS for p in outputs[name].get(key, ())):
                point.pop("threshold")
                point.pop("log_odds", None)
    found: dict[str, Any] = {
        "rule": LEVELS[cases.level],
        "rows": len(cases),
        **counted_patients(cases.patients),
        "outputs": outputs,
    }
    if len(cases.outputs) > 1:
        found["mean_auc"] = measure_mean(cases, resamples)
    if cases.kind != "labels" and cases.probable:
        found |= measure_classes(cases, resamples)
    if settings.by:
        found["subgroups"] = {by: _subgroups(cases, by, outputs, settings, chosen) for by in settings.by}
    return found


def _subgroups(
    cases: Cases, by: str, outputs: dict[str, Any], settings: Settings, chosen: _Thresholds
) -> dict[str, Any]:
    """For each output: the common threshold of all subgroups, and their rows."""
    found = {}
    for column, name in enumerate(cases.outputs):
        if "undefined" in outputs[name]:
            continue
        limit = outputs[name].get("threshold")
        if limit is None and chosen.own:
            limit = outputs[name]["sensitivity_at_specificity"][len(settings.rates) // 2]
        shared = chosen.score(limit)
        rows = subgroups(cases, column, by, shared, count=settings.resamples, seed=settings.seed)
        own = limit or {}
        found[name] = {"threshold": own.get("threshold"), "log_odds": own.get("log_odds"), "rows": rows}
    return found


def score_of(cases: Cases, settings: Settings) -> float | None:
    """The threshold as a score: log-odds of a probability, if scores are log-odds."""
    if any(value is not None and value != value for value in (settings.threshold, settings.log_odds)):
        raise DataError("the threshold is not a number (NaN); pass a number")
    if settings.log_odds is not None:
        if not cases.probable:
            raise DataError("the scores only rank, they are not log-odds; give the threshold as a score")
        return settings.log_odds
    if settings.threshold is None or not cases.probable:
        return settings.threshold
    if not 0 <= settings.threshold <= 1:
        raise DataError(f"the threshold must be a probability between 0 and 1, not {settings.threshold:g}")
    return float(odds.of_probabilities(settings.threshold))


def bands(values: Sequence[str], name: str) -> list[str]:
    """The subgroup of each value: the value, or in columns of many numbers its decade (ages) or quartile; "" if empty.

    For a breast with several numbers (joined by plus signs), their mean counts.
    """
    several = [_numbers_in(value) for value in values]
    if None in several or len({number for of in several if of for number in of}) <= _FEW:
        return list(values)
    numbers = [float(np.mean(of)) if of else None for of in several]
    if "age" in re.split(r"[\W_]+", name.lower()):
        return ["" if n is None else f"{int(n // 10) * 10}-{int(n // 10) * 10 + 9}" for n in numbers]
    given = np.array([n for n in numbers if n is not None])
    edges = np.unique(np.quantile(given, [0, 0.25, 0.5, 0.75, 1]))
    texts = [f"{low} to {high}" for low, high in itertools.pairwise(_distinct_texts(edges))]
    last = len(texts) - 1
    return ["" if n is None else texts[min(int(np.searchsorted(edges, n, "right")) - 1, last)] for n in numbers]


def _numbers_in(value: str) -> list[float] | None:
    """The numbers in a cell, joined by plus signs; None for other content."""
    if not value:
        return []
    parts = [value] if number(value) is not None else value.split("+")
    found = [known for part in parts if (known := number(part)) is not None]
    return found if len(found) == len(parts) else None


def _distinct_texts(edges: NDArray[np.float64]) -> list[str]:
    """Distinct texts of different numbers, with six digits if these suffice."""
    texts = ([f"{edge:.{digits}g}" for edge in edges] for digits in range(6, 18))
    return next(found for found in texts if len(set(found)) == len(edges))


def _sort_key(value: str) -> tuple[bool, float, str]:
    """The sort key of a subgroup: its leading number; unknown values come last."""
    begins = re.match(r"-?\d+\.?\d*(e[+-]?\d+)?", value)
    return not value, float(begins[0]) if begins else 0.0, value


def subgroups(
    cases: Cases, column: int, by: str, threshold: float | None, *, count: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """For each value of a column: rows, patients, AUC with intervals, sensitivity and specificity at one threshold.

    Args:
        cases: at their level; values of several images of a breast are joined by a plus sign.
        column: of the output.
        by: name of the column.
        threshold: score from which a row is called positive, common to all subgroups; None omits sensitivity and
            specificity.
        count, seed: of the bootstrap.

    Raises:
        DataError: if the column does not exist.
    """
    if by not in cases.columns:
        there = ", ".join(sorted(cases.columns)) or "none"
        raise DataError(f"unknown column {by!r} for subgroups; there are {there} (--table adds those of the table)")
    names = np.array(bands(cases.columns[by], by), dtype=str)
    known = ~np.isnan(cases.truth[:, column])
    return [
        {
            "value": value or "not known",
            **_subgroup(cases.where(known & (names == value)), column, threshold, count, seed),
        }
        for value in sorted(set(names[known]), key=_sort_key)
    ]


def _subgroup(part: Cases, column: int, threshold: float | None, count: int, seed: int) -> dict[str, Any]:
    truth, scores = part.truth[:, column], part.scores[:, column]
    positives = int(truth.sum())
    found: dict[str, Any] = {"rows": len(part), **counted_patients(part.patients), "positives": positives}
    if not 0 < positives < len(part):
        found["undefined"] = one_class(len(part), positives, part.level)
    else:
        resamples = Resamples(part.clusters, count, seed)
        weighted = WeightedCurves(truth, roc.ranks(scores))
        found["auc"] = {
            **roc.area_with_interval(truth, scores),
            **resamples.spreads(lambda w: {"auc": weighted(w).auc()})["auc"].listed(),
        }
    if threshold is not None:
        called: NDArray[np.bool_] = scores >= threshold
        found["sensitivity"] = float(called[truth > 0].mean()) if positives else None
        found["specificity"] = float((~called[truth == 0]).mean()) if positives < len(part) else None
    return found
