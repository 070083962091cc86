"""What is trained: a network with its examples, its loss and its score."""

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
    """What validation data say of an epoch."""

    value: float
    """Larger is better."""
    tie: float = 0.0
    """Decides between epochs of equal value; larger is better."""
    columns: Mapping[str, float] = field(default_factory=dict)
    """Of ``log.csv``, in place of its column score."""
    shown: Mapping[str, float] = field(default_factory=dict)
    """What the line of an epoch tells, in place of the value."""
    stop: float | None = None
    """What patience and plateau go by, larger is better; the value where it is None."""


class Task:
    """A network with its examples, its loss and its score. `gigamorph train` and each recipe derive their own.

    Attributes:
        module: all parameters and buffers. What `accelerate` makes of its parts shares them.
        record: what checkpoints say of the network besides its weights: plain containers, numbers and texts.
        meter: counts images and pixels.
        group: the processes that train together. `run_stages` sets both before the first example.
    """

    module: nn.Module
    record: Mapping[str, Any] = MappingProxyType({})
    meter = Meter(None)
    group = ProcessGroup()
    best_by_loss = False
    """Whether, where there is no score, the epoch of the smallest training loss is kept, not the last."""

    def examples(self, epoch: int) -> Sequence[Any]:
        """The examples of an epoch, counted on through the stages; taken in an order that is drawn anew each time.

        All epochs of a stage have equally many.
        """
        raise NotImplementedError

    def order(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """The numbers of an epoch's examples, (count,), in the order in which they are taken."""
        return generator.permutation(count)

    def ahead(self, batch: Sequence[Any], seed: int) -> None:
        """A batch of which `loss` will be asked after the one in work: it may be read while that is computed.

        Args:
            seed: with which PyTorch's random numbers will begin then.
        """

    def loss(self, batch: Sequence[Any]) -> Tensor:
        """The mean loss of a batch, a scalar."""
        raise NotImplementedError

    def blame(self, batch: Sequence[Any]) -> str:
        """What of a batch is to blame for a loss that is no number, with its name; empty where nothing is known."""
        return ""

    def score(self) -> Score | float | None:
        """On validation data, in evaluation mode without gradients; larger is better. None where there are none."""
        return None

    def begin_epoch(self, epoch: int) -> None:
        """Work between epochs, in evaluation mode without gradients. What it leaves belongs into `state`."""

    def draw(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Pictures of all rows of ``log.csv`` so far, at times and where a run ends; in the process that leads."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the module: plain containers, numbers, texts and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
