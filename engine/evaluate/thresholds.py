"""Thresholds that do again what is told of them: numbers of few digits that call the same rows as the score itself.

A probability near 1 has few digits left of its log-odds, and a rounded one may lie above the row that it was taken
from. So a threshold is any number between that row's score and the next lower one, rounded towards the lower.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

import numpy as np

from . import odds


def threshold(score: float | None, lower: float | None, probable: bool) -> dict[str, Any]:
    """A threshold from which on rows of this score and above are called, and none below.

    Args:
        score: None calls no row.
        lower: the highest score that is not called, if there is any.
        probable: whether scores are log-odds.

    Returns:
        threshold: a probability (of scores that only rank: a score), None where no row is called or where none parts
        the two. Of probabilities log_odds too, None where that is minus infinity and every row is called.
    """
    if score is None:
        return {"threshold": None} | ({"log_odds": None} if probable else {})
    below, least_called = -np.inf if lower is None else lower, score

    def parts(value: float) -> bool:
        return (below < value or lower is None) and value <= least_called

    if not probable:
        return {"threshold": _short(score, parts)}

    def parts_probabilities(p: float) -> bool:
        is_above = lower is None or float(odds.probabilities(below)) < p
        return parts(float(odds.of_probabilities(p))) and is_above and p <= float(odds.probabilities(least_called))

    probability = _short(float(odds.probabilities(score)), parts_probabilities)
    if score == np.inf:  # as good as any number above the next score
        score = below + 1 if np.isfinite(below) else 0.0
    return {"threshold": probability, "log_odds": _short(score, parts) if np.isfinite(score) else None}


def _short(value: float, fits: Callable[[float], bool]) -> float | None:
    """The value rounded down to the fewest digits, four at least, that fit."""
    for digits in range(4, 18):
        rounded = float(Context(prec=digits, rounding=ROUND_FLOOR).create_decimal(Decimal(value)))
        if fits(rounded):
            return rounded
    return value if fits(value) else None
