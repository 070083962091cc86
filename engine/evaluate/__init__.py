"""How good predictions are: areas, operating points, calibration, free-response ROC, all with intervals over patients;
studies of several readers.

Numpy, scipy and scikit-learn on float64; nothing here knows of networks. Larger scores mean 1, and scores are log-odds
wherever they come from a network, so that no ranking is lost to the rounding of probabilities near 0 and 1.

A name is imported when it is first asked for: a prediction needs the log-odds of this room and none of its statistics.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import LEVELS, Cases
    from .measures import pf1, quadratic_kappa
    from .read import read_cases, read_marks, write_cases
    from .readers import reader_study
    from .roc import auc, delong, delong_interval, labelwise_auc, macro_auc, paired_delong, partial_auc

_HOMES = {
    "LEVELS": "cases",
    "Cases": "cases",
    "pf1": "measures",
    "quadratic_kappa": "measures",
    "read_cases": "read",
    "read_marks": "read",
    "write_cases": "read",
    "reader_study": "readers",
    "auc": "roc",
    "delong": "roc",
    "delong_interval": "roc",
    "labelwise_auc": "roc",
    "macro_auc": "roc",
    "paired_delong": "roc",
    "partial_auc": "roc",
}

__all__ = [
    "LEVELS",
    "Cases",
    "auc",
    "delong",
    "delong_interval",
    "labelwise_auc",
    "macro_auc",
    "paired_delong",
    "partial_auc",
    "pf1",
    "quadratic_kappa",
    "read_cases",
    "read_marks",
    "reader_study",
    "write_cases",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
