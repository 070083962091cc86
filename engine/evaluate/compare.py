"""Two predictions of the same rows: paired DeLong test, and the difference over resampled patients."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from ..errors import DataError
from . import curves, roc
from .bootstrap import Resamples, interval
from .cases import Cases


def common(first: Cases, second: Cases) -> tuple[Cases, Cases]:
    """The labelled rows that both have, in the order of the first.

    Raises:
        DataError: if names are not unique, nothing is common, outputs differ, or a row has two truths.
    """
    first, second = first.labelled(), second.labelled()
    if first.outputs != second.outputs or first.kind != second.kind:
        raise DataError(
            f"the two predictions are of other outputs: {', '.join(first.outputs)}; {', '.join(second.outputs)}"
        )
    for cases in (first, second):
        if len(set(cases.names)) != len(cases):
            twice = next(name for name in cases.names if cases.names.count(name) > 1)
            raise DataError(f"{twice}: is there twice, so that predictions cannot be paired; leave one out")
    places = {name: row for row, name in enumerate(second.names)}
    rows = [row for row, name in enumerate(first.names) if name in places]
    if not rows:
        names = "; ".join(cases.names[0] if len(cases) else "none" for cases in (first, second))
        raise DataError(f"the two predictions have no {first.level} with a label in common ({names})")
    one, two = first.where(rows), second.where([places[first.names[row]] for row in rows])
    differ = np.flatnonzero(~np.isclose(one.truth, two.truth, equal_nan=True).all(1))
    if len(differ):
        raise DataError(f"{one.names[differ[0]]}: the two predictions have different labels; take those of one table")
    return one, two


def compare(first: Cases, second: Cases, *, count: int = 2000, seed: int = 0) -> dict[str, Any]:
    """By output: both areas, their difference (second minus first), DeLong's z and p, and the bootstrap's interval."""
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
        except ValueError as error:
            found[name] = {"undefined": str(error)}
            continue
        if paired["p"] is None:
            paired["why"] = "the variance of the difference is 0: the two rank alike"
        both = [curves.WeightedCurves(truth, each) for each in scores]
        drawn = resamples.values(
            lambda w, both=both: {str(k): curves.auc(*curve.counts(w)) for k, curve in enumerate(both)}, rows
        )
        found[name] = {**paired, "bootstrap": interval(drawn["1"] - drawn["0"])}
    return found
