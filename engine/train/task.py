"""The interface of a training task: a network with its examples, loss and score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..parallel.process_group import ProcessGroup
from .progress import Meter


@dataclass(frozen=True)
class Score:
    """The validation score of an epoch."""

    value: float
    """The score; larger is better."""
    tie: float = 0.0
    """Tie-breaker between epochs of equal value; larger is better."""
    columns: Mapping[str, float] = field(default_factory=dict)
    """Columns of ``log.csv`` that replace the column score."""
    shown: Mapping[str, float] = field(default_factory=dict)
    """Values in the printed line of an epoch, instead of `value`."""
    stop: float | None = None
    """Score for patience and plateau; larger is better. None uses `value`."""


class Task:
    """A network with its examples, loss and score. `gigamorph train` and each recipe derive from it.

    Attributes:
        module: all parameters and buffers, which accelerated versions of its parts share.
        record: description of the network for checkpoints: plain containers, numbers and strings.
        meter: counts images and pixels. `run_stages` sets it before the first example.
        group: the processes that train together. `run_stages` sets it before the first example.
    """

    module: nn.Module
    record: Mapping[str, Any] = MappingProxyType({})
    meter = Meter(None)
    group = ProcessGroup()
    best_by_loss = False
    """Whether, without a score, the epoch with the smallest training loss is saved as the best, not the last."""

    def examples(self, epoch: int) -> Sequence[Any]:
        """The examples of an epoch, which is counted through all stages; their order is drawn separately.

        All epochs of a stage have equally many examples.
        """
        raise NotImplementedError

    def order(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """The indices (count,) of an epoch's examples, in training order."""
        return generator.permutation(count)

    def ahead(self, batch: Sequence[Any]) -> None:
        """Announce the batch after the current one, which may be read while the current one is computed.

        Args:
            batch: the argument of the next call of `loss`.
        """

    def loss(self, batch: Sequence[Any]) -> Tensor:
        """The mean loss of a batch, a scalar."""
        raise NotImplementedError

    def blame(self, batch: Sequence[Any]) -> str:
        """The cause of a non-finite loss in a batch, with the image's name; empty if unknown."""
        return ""

    def score(self) -> Score | float | None:
        """The validation score, computed in evaluation mode; larger is better. None without validation data."""
        return None

    def begin_epoch(self, epoch: int) -> None:
        """Work before an epoch, in evaluation mode without gradients. Its results belong into `state`."""

    def draw(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Plot all rows of ``log.csv``; the leading process calls it repeatedly and at the end of a run."""

    def state(self) -> dict[str, Any]:
        """State for checkpoints, in addition to the module: plain containers, numbers, strings and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a result of `state`."""
