"""Measures in subgroups of the rows: by view, density, manufacturer, age."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..datasets.tables.values import number
from ..errors import DataError
from . import roc
from .bootstrap import Resamples
from .cases import Cases, counted_patients
from .curves import WeightedCurves
from .measures import one_class

_FEW = 12  # numbers with more distinct values are grouped into bands


def bands(values: Sequence[str], name: str) -> list[str]:
    """The subgroup of each value: the value, or in columns of many numbers its decade (ages) or quartile; "" if empty.

    For a breast with several numbers (joined by plus signs), their mean counts.
    """
    several = [_numbers(value) for value in values]
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


def _numbers(value: str) -> list[float] | None:
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
        {"value": value or "not known", **_part(cases.where(known & (names == value)), column, threshold, count, seed)}
        for value in sorted(set(names[known]), key=_sort_key)
    ]


def _part(part: Cases, column: int, threshold: float | None, count: int, seed: int) -> dict[str, Any]:
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
