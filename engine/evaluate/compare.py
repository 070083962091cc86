"""Compares two predictions of the same rows: paired DeLong test, and bootstrap of the difference over patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..errors import DataError
from . import roc
from .bootstrap import Resamples
from .cases import Cases
from .curves import WeightedCurves

Key = tuple[str, ...]


class UnpairedError(DataError):
    """Rows of two predictions that cannot be paired."""


def common(first: Cases, second: Cases) -> tuple[Cases, Cases]:
    """The labelled rows in both predictions, in the order of the first.

    Rows are paired by name. If no name is in both (other files of the same breasts, or a table of a reader's scores),
    they are paired by the available ones of patient, exam, side and view, if these are unique in both.

    Raises:
        UnpairedError: if rows are not unique, or there are no common rows.
        DataError: if outputs differ, or a row has different truths.
    """
    first, second = first.labelled(), second.labelled()
    if sorted(first.outputs) == sorted(second.outputs):
        second = second.in_order(first.outputs)
    if first.outputs != second.outputs or first.kind != second.kind:
        raise DataError(
            f"the two predictions have different outputs: {', '.join(first.outputs)}; {', '.join(second.outputs)}"
        )
    keys, others = _keys(first, second)
    for cases, of in ((first, keys), (second, others)):
        if len(set(of)) != len(of):
            twice = next(name for name, key in zip(cases.names, of, strict=True) if of.count(key) > 1)
            raise UnpairedError(f"{twice}: occurs twice, so predictions cannot be paired; remove one")
    places = {key: row for row, key in enumerate(others)}
    rows = [row for row, key in enumerate(keys) if key in places]
    if not rows:
        names = "; ".join(cases.names[0] if len(cases) else "none" for cases in (first, second))
        raise UnpairedError(
            f"the two predictions have no {first.level} with a label in common ({names}), by name or by patient, "
            "exam, side and view; compare predictions of the same images"
        )
    one, two = first.where(rows), second.where([places[keys[row]] for row in rows])
    differ = np.flatnonzero(~np.isclose(one.truth, two.truth, equal_nan=True).all(1))
    if len(differ):
        raise DataError(f"{one.names[differ[0]]}: the two predictions have different labels; use those of one table")
    return one, two


def _keys(first: Cases, second: Cases) -> tuple[Sequence[Key], Sequence[Key]]:
    """The unique keys of the rows of each: names, or patient, exam, side and view."""
    of_frames = first.level == "image" and "frame" in first.columns and "frame" in second.columns
    names = [
        list(zip(cases.names, cases.columns["frame"] if of_frames else ("",) * len(cases), strict=True))
        for cases in (first, second)
    ]
    if set(first.names) & set(second.names):
        return names[0], names[1]
    known = [_known(cases) for cases in (first, second)]
    both = [what for what in known[0] if any(known[0][what]) and any(known[1][what])]
    if "patient" not in both:
        return names[0], names[1]
    keys = [list(zip(*(of[what] for what in both), strict=True)) for of in known]
    return (keys[0], keys[1]) if all(len(set(of)) == len(of) for of in keys) else (names[0], names[1])


def known_keys(cases: Cases) -> list[Key] | None:
    """Patient, exam, side and view of each row; None if no patient is known."""
    return list(zip(*_known(cases).values(), strict=True)) if any(cases.patients) else None


def _known(cases: Cases) -> dict[str, tuple[str, ...]]:
    """The identifying columns of rows other than names; "" where unknown."""
    found = {"patient": cases.patients, "exam": cases.exams}
    if cases.level != "exam":
        found["side"] = cases.sides
    if cases.level == "image":
        found["view"] = cases.columns.get("view", ("",) * len(cases))
    return found


def compare(first: Cases, second: Cases, *, count: int = 2000, seed: int = 0) -> dict[str, Any]:
    """For each output both AUCs, their difference (second minus first), DeLong's z and p, and a bootstrap interval."""
    one, two = common(first, second)
    resamples = Resamples(one.clusters, count, seed)
    left_out = len(first.labelled()) + len(second.labelled()) - 2 * len(one)
    found: dict[str, Any] = {"rows": len(one), "left_out": left_out}
    for column, name in enumerate(one.outputs):
        rows = ~np.isnan(one.truth[:, column])
        truth = one.truth[rows, column]
        scores = [roc.ranks(cases.scores[rows, column]) for cases in (one, two)]
        try:
            paired = asdict(roc.paired_delong(truth, *scores))
        except roc.UndefinedError as error:
            found[name] = {"undefined": str(error)}
            continue
        if paired["p"] is None:
            alike = ": both rank the rows equally" if paired["difference"] == 0 else ""
            paired["why"] = f"the variance of the difference is 0{alike}"
        both = [WeightedCurves(truth, each) for each in scores]
        drawn = resamples.values(lambda w, both=both: {str(k): c(w).auc() for k, c in enumerate(both)}, rows)
        found[name] = {**resamples.spread(drawn["1"] - drawn["0"]).listed(), **paired}
    return found
