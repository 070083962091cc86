"""All of it at once: what ``metrics.json`` holds and the report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..versions import versions
from . import froc, odds
from .bootstrap import Resamples
from .cases import LEVELS, Cases, Level
from .compare import UnpairedError, compare
from .measures import measure_classes, measure_mean, measure_output, threshold_at
from .subgroups import subgroups

RATES = (0.8, 0.9, 0.95)
POINTS = ("sensitivity_at_specificity", "specificity_at_sensitivity")


@dataclass(frozen=True)
class Settings:
    """What is measured besides the areas.

    Attributes:
        levels: None takes images, and breasts and exams where they are fewer.
        rates: specificities at which the sensitivity is told, and the other way round.
        threshold: probability (of scores that only rank: score) from which on a row is called; fixed before.
        by: columns whose values make subgroups.
        resamples: of the bootstrap.
        false_marks: per image, at which FROC's sensitivity is told.
        iou: of FROC, the least intersection over union of a mark's box and the lesion's that it finds; None takes marks
            whose middle lies in the lesion's box.
        log_odds: the threshold as log-odds, where probabilities are too near 0 or 1 to be told apart.
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
    """Measure predictions at each level; plain values, which go into JSON as they are.

    Args:
        images: with their scores; those without a label count where another view of their breast has one.
        other: another prediction of the same images, to be compared.
        marked: marks and lesions, for FROC.
        validation: images of split val, whose threshold at the middle rate others are called from where none was fixed
            before. Only rows of split val, or without a split, have thresholds of their own.

    Raises:
        DataError: if nothing can be measured at any level, for all rows are of one class or none has a label; unknown
            columns.
    """
    if images.kind == "numbers":
        raise DataError("these are numbers, no classes or labels; numbers.evaluate_numbers measures them")
    settings = settings or Settings()
    found: dict[str, Any] = {
        "kind": images.kind,
        "outputs": list(images.outputs),
        **({"ordered": images.ordered} if images.kind == "classes" else {}),
        "resamples": settings.resamples,
        "seed": settings.seed,
        "levels": {},
    }
    there = at_levels(images, settings.levels)
    for level, cases in there.items():
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
    """The rows at a level, without those that are in none of its breasts or exams."""
    return images.placed(level).at(level)


def at_levels(images: Cases, levels: Sequence[Level] | None = None) -> dict[Level, Cases]:
    """The rows at each of these levels; None takes their own, and those above at which there are fewer."""
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
    """The comparison at a level, or why the rows of this level are not paired."""
    if other.level not in ("image", cases.level):
        return {"unpaired": f"the other prediction is of {other.level}s, and has no {cases.level}s"}
    try:
        return compare(cases, at_level(other, cases.level), count=settings.resamples, seed=settings.seed)
    except UnpairedError as error:
        return {"unpaired": str(error)}


class _Thresholds:
    """From which score on the rows of a level are called: one that was fixed before, or that of validation rows."""

    def __init__(self, cases: Cases, settings: Settings, validation: Cases | None) -> None:
        self._cases, self._settings = cases, settings
        self.own = set(cases.columns.get("split", ())) <= {"", "val"}
        """Whether thresholds may be those of the measured rows."""
        self._validation = None if self.own else validation

    def of(self, column: int) -> dict[str, Any] | None:
        """threshold and log_odds as in `thresholds.threshold`, and where they are from; None where there are none."""
        settings = self._settings
        if settings.threshold is not None or settings.log_odds is not None:
            return {"threshold": settings.threshold, "log_odds": settings.log_odds, "from": "given"}
        if self._validation is None or not settings.rates:
            return None
        rate = settings.rates[len(settings.rates) // 2]
        found = threshold_at(self._validation, column, rate)
        return None if found is None else {**found, "from": f"split val, specificity {rate:g}"}

    def score(self, limit: dict[str, Any] | None) -> float | None:
        """The score that `of` is; None where no row is called, too."""
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
        **cases.counted_patients(),
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
    """By output: the threshold that all subgroups share, and their rows."""
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
    """The score that the threshold is: log-odds of a probability, where scores are log-odds."""
    if any(value is not None and value != value for value in (settings.threshold, settings.log_odds)):
        raise DataError("the threshold is not a number (NaN)")
    if settings.log_odds is not None:
        if not cases.probable:
            raise DataError("the scores only rank, they are no log-odds; give the threshold as a score")
        return settings.log_odds
    if settings.threshold is None or not cases.probable:
        return settings.threshold
    if not 0 <= settings.threshold <= 1:
        raise DataError(f"the threshold is a probability, between 0 and 1, not {settings.threshold:g}")
    return float(odds.of_probabilities(settings.threshold))
