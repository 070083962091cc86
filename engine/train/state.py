"""The progress of a training through stages, and its results so far."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .stages import Stage
from .task import Score


@dataclass
class State:
    """The progress, as plain values for checkpoints."""

    stage: int = 0
    within: int = 0
    """Completed epochs of the stage."""
    epoch: int = 0
    """Completed epochs of all stages."""
    batch: int = 0
    """Completed batches of the current epoch, over all processes."""
    losses: list[float] = field(default_factory=list)
    """Losses of this process's batches in the current epoch."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of ``log.csv``."""
    best: list[float] | None = None
    """Value and tie-breaker of the best score."""
    best_epoch: int = 0
    """Counted from 1, through the stages."""
    decay: float = 1.0
    """Factor of the stage's learning rate."""
    stage_best: float = -math.inf
    stale: int = 0
    """Epochs of the stage without a better value."""
    stopped: bool = False
    """Whether a user's callback has ended the stage."""

    def is_over(self, stage: Stage) -> bool:
        return (
            self.within >= stage.epochs or self.stopped or (stage.patience is not None and self.stale >= stage.patience)
        )

    def ending(self, stage: Stage) -> str:
        """A text on why a stage is over; empty if it is not."""
        if self.within >= stage.epochs:
            return f"complete after epoch {stage.epochs}"
        if self.stopped:
            return f"stopped by a callback after epoch {self.within} of {stage.epochs}"
        if self.is_over(stage):
            return f"stopped early after epoch {self.within} of {stage.epochs}: no better score in {self.stale} epochs"
        return ""

    def end_epoch(self, stage: Stage, row: dict[str, Any], score: Score | None) -> bool:
        """Count an epoch; returns whether it is the best so far. Without a score the latest epoch is the best."""
        self.rows.append(row)
        value = -row["train_loss"] if score is None else score.value if score.stop is None else score.stop
        self.stale = 0 if value > self.stage_best else self.stale + 1
        self.stage_best = max(self.stage_best, value)
        if stage.plateau is not None and self.stale and self.stale % stage.plateau == 0:
            self.decay *= 0.1
        self.epoch, self.within, self.batch, self.losses = self.epoch + 1, self.within + 1, 0, []
        found = None if score is None else [score.value, score.tie]
        if found is not None and self.best is not None and found <= self.best:
            return False
        self.best, self.best_epoch = found, self.epoch
        return True

    def next_stage(self) -> None:
        self.stage, self.within = self.stage + 1, 0
        self.decay, self.stage_best, self.stale, self.stopped = 1.0, -math.inf, 0, False

    def stored(self, losses: list[float]) -> dict[str, Any]:
        """The state for a checkpoint, with the losses of all processes."""
        return {**asdict(self), "losses": losses}
