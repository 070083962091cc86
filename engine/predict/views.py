"""Predictions of breasts and exams by networks that were trained on combined views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..evaluate.cases import Level
from ..evaluate.recalibration import Calibration
from ..models.outputs import Outputs
from ..train.metrics import Prediction, per_breast, per_exam


def combined(
    outputs: Outputs, classes: Sequence[str], calibration: Calibration | None, level: Level, views: Sequence[Prediction]
) -> Prediction:
    """The prediction of a breast or exam, combined from the network's outputs for its views as in the training.

    Args:
        outputs: of the network, with `views`.
        classes: names of the outputs.
        calibration: of two classes.
        level: "breast" or "exam".
        views: predictions of the views of one breast or exam, each with its row.
    """
    [found] = (per_breast if level == "breast" else per_exam)(views, classes)
    rows = torch.tensor([view.row for view in views], dtype=torch.float64)
    log_odds = outputs.log_odds(outputs.together(rows))[0].tolist()
    if calibration is not None:
        log_odds = calibration.both(log_odds)
    return replace(found, log_odds=tuple(log_odds), level=level)
