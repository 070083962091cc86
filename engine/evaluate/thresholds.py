"""Reproducible thresholds: numbers with few digits that call the same rows as the exact score.

A rounded probability near 1 may be above the row from which it was taken. So a threshold is a number between this row's
score and the next lower one, rounded towards the lower score.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

import numpy as np

from . import odds


def threshold(score: float | None, lower: float | None, probable: bool) -> dict[str, Any]:
    """A threshold that calls rows with at least this score, and no others.

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
