"""Where a training through stages is, and what it has found so far."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .stages import Stage
from .task import Score


@dataclass
class State:
    """Plain values, which checkpoints hold."""

    stage: int = 0
    within: int = 0
    """Epochs of the stage that are complete."""
    epoch: int = 0
    """Epochs of all stages that are complete."""
    batch: int = 0
    """Batches of the epoch under way that are done, by all processes."""
    losses: list[float] = field(default_factory=list)
    """Of the batches of the epoch under way that this process has done."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of ``log.csv``."""
    best: list[float] | None = None
    """Value and tie of the best score."""
    best_epoch: int = 0
    """Counted from 1, through the stages."""
    decay: float = 1.0
    """Factor of the stage's learning rate."""
    stage_best: float = -math.inf
    stale: int = 0
    """Epochs of the stage without a better value."""
    stopped: bool = False
    """A callback of the user's has ended the stage."""

    def is_over(self, stage: Stage) -> bool:
        return (
            self.within >= stage.epochs or self.stopped or (stage.patience is not None and self.stale >= stage.patience)
        )

    def ending(self, stage: Stage) -> str:
        """Why a stage is over, for people; empty where it is not."""
        if self.within >= stage.epochs:
            return f"complete after epoch {stage.epochs}"
        if self.stopped:
            return f"stopped by a callback after epoch {self.within} of {stage.epochs}"
        if self.is_over(stage):
            return f"stopped early after epoch {self.within} of {stage.epochs}: no better score in {self.stale} epochs"
        return ""

    def end_epoch(self, stage: Stage, row: dict[str, Any], score: Score | None) -> bool:
        """Count an epoch; returns whether it is the best so far. Without a score the latest is the best known."""
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
        """For a checkpoint; the losses are those of all processes."""
        return {**asdict(self), "losses": losses}
