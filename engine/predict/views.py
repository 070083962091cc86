"""Breasts and exams by networks that were trained on several views as one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..evaluate.cases import Level
from ..evaluate.recalibration import Calibration
from ..models.outputs import Outputs
from ..train.metrics import Prediction, per_breast, per_exam


def combined(
    outputs: Outputs,
    classes: Sequence[str],
    calibration: Calibration | None,
    level: Level,
    views: Sequence[Prediction],
) -> Prediction:
    """The views of a breast or an exam as one, combined by what the network gave of each as in its training.

    Args:
        outputs: with `views`.
        calibration: of two classes.
        level: "breast" or "exam".
        views: of one breast or exam, each with its row.
    """
    [found] = (per_breast if level == "breast" else per_exam)(views, classes)
    rows = torch.tensor([view.row for view in views], dtype=torch.float64)
    log_odds = outputs.log_odds(outputs.together(rows))[0].tolist()
    if calibration is not None:
        log_odds = calibration.both(log_odds)
    return replace(found, log_odds=tuple(log_odds), level=level)
