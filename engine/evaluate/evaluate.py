"""All of it at once: what ``metrics.json`` holds and the report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..errors import DataError
from . import froc, odds
from .bootstrap import Resamples
from .cases import LEVELS, Cases, Level
from .compare import compare
from .measures import measure_classes, measure_mean, measure_output
from .subgroups import subgroups

RATES = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Settings:
    """What is measured besides the areas.

    Attributes:
        levels: None takes images, and breasts and exams where they are fewer.
        rates: specificities at which the sensitivity is told, and the other way round.
        threshold: probability (of scores that only rank: score) from which on a row is called; fixed before.
        by: columns whose values make subgroups.
        resamples: of the bootstrap.
    """

    levels: tuple[Level, ...] | None = None
    rates: tuple[float, ...] = RATES
    threshold: float | None = None
    by: tuple[str, ...] = ()
    resamples: int = 2000
    seed: int = 0


def evaluate(
    images: Cases,
    settings: Settings | None = None,
    *,
    other: Cases | None = None,
    marked: Sequence[froc.Marked] | None = None,
) -> dict[str, Any]:
    """Measure predictions at each level; plain values, which go into JSON as they are.

    Args:
        images: with their scores; those without a label count where another view of their breast has one.
        other: another prediction of the same images, to be compared.
        marked: marks and lesions, for FROC.

    Raises:
        DataError: if nothing can be measured at any level, for all rows are of one class or none has a label; unknown
            columns.
    """
    settings = settings or Settings()
    found: dict[str, Any] = {
        "kind": images.kind,
        "outputs": list(images.outputs),
        "resamples": settings.resamples,
        "seed": settings.seed,
        "levels": {},
    }
    for level in settings.levels or levels_of(images):
        there = images.at(level).labelled()
        found["levels"][level] = _at_level(there, settings) | {"without_label": len(images.at(level)) - len(there)}
        if other is not None:
            options = {"count": settings.resamples, "seed": settings.seed}
            found["levels"][level]["comparison"] = compare(there, other.at(level), **options)
    of_all = [output for one in found["levels"].values() for output in one["outputs"].values()]
    if all("undefined" in output for output in of_all):
        raise DataError(f"{of_all[0]['undefined']}; nothing can be measured")
    if marked is not None:
        found["froc"] = froc.measure(marked, count=settings.resamples, seed=settings.seed)
    found["versions"] = {name: version(name) for name in ("gigamorph", "numpy", "scipy", "scikit-learn")}
    return found


def levels_of(images: Cases) -> tuple[Level, ...]:
    """The level of the rows, and those above at which there are fewer."""
    if images.level != "image":
        return (images.level,)
    levels: list[Level] = ["image"]
    breasts, exams = len(images.at("breast")), len(images.at("exam"))
    if breasts < len(images):
        levels.append("breast")
    if exams < breasts:
        levels.append("exam")
    return tuple(levels)


def _at_level(cases: Cases, settings: Settings) -> dict[str, Any]:
    resamples = Resamples(cases.clusters, settings.resamples, settings.seed)
    threshold = score_of(cases, settings.threshold)
    outputs = {
        name: measure_output(cases, column, resamples, settings.rates, threshold)
        for column, name in enumerate(cases.outputs)
    }
    found: dict[str, Any] = {
        "rule": LEVELS[cases.level],
        "rows": len(cases),
        "patients": resamples.patients,
        "outputs": outputs,
    }
    if len(cases.outputs) > 1:
        found["mean_auc"] = measure_mean(cases, resamples)
    if cases.kind != "labels" and cases.probable:
        found |= measure_classes(cases, resamples)
    if settings.by:
        found["subgroups"] = {by: _subgroups(cases, by, outputs, settings) for by in settings.by}
    return found


def _subgroups(cases: Cases, by: str, outputs: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """By output: the threshold that all subgroups share, and their rows."""
    found = {}
    for column, name in enumerate(cases.outputs):
        if "undefined" in outputs[name]:
            continue
        shared = score_of(cases, settings.threshold)
        if shared is None:
            point = outputs[name]["sensitivity_at_specificity"][len(settings.rates) // 2]
            shared = point["log_odds"] if cases.probable else point["threshold"]
        rows = subgroups(cases, column, by, shared, count=settings.resamples, seed=settings.seed)
        shown = None if shared is None else float(odds.probabilities(shared)) if cases.probable else shared
        found[name] = {"threshold": shown, "rows": rows}
    return found


def score_of(cases: Cases, threshold: float | None) -> float | None:
    """The score that a threshold is: log-odds of a probability, where scores are log-odds."""
    if threshold is None or not cases.probable:
        return threshold
    if not 0 < threshold < 1:
        raise DataError(f"the threshold is a probability, between 0 and 1, not {threshold:g}")
    return float(odds.of_probabilities(threshold))
