"""Base classes of tasks on images of any size: examples, prediction, and the validation score."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from ..accelerate import Accelerated
from ..errors import DataError
from ..images.pixels import PixelSource, stored_source
from .data import Images, set_epoch_of
from .metrics import COUNTS, SHOWN, SMALLER
from .options import Loss
from .pixels import is_blank, read_through, sources_of
from .target import Target
from .task import Score, Task

Found = TypeVar("Found")
log = logging.getLogger("gigamorph")


class ImageTask(Task):
    """A network trained on images of any size, inside a memory budget.

    Args:
        module: see `Task`.
        net: the accelerated network that computes it.
        train: training images; ``set_epoch`` is called in each epoch if they have it.
        val: validation images, which select the best epoch.
        record: description of the network for checkpoints.
    """

    def __init__(
        self, module: nn.Module, net: Accelerated, train: Images, val: Images, record: Mapping[str, Any]
    ) -> None:
        self.module, self.net, self.images, self.val, self.record = module, net, train, val, record
        net.on_tile = lambda event: self.meter.on_tile(event)

    def examples(self, epoch: int) -> Any:
        set_epoch_of(self.images, epoch)
        return self.images

    def blame(self, batch: Sequence[Any]) -> str:
        for item in batch:
            for source in sources_of(item):
                try:
                    read_through(source, _file_of(source, item))
                except DataError as error:
                    return str(error)
        return ""


class TargetTask(ImageTask, Generic[Found]):
    """A task of `gigamorph train`; derived classes define the loss and the result per image (``Found``).

    Args:
        net, train, val, record: see `ImageTask`.
        target: what is learnt.
        settings: of the loss.
        weights: class weights of the loss, see `Target.weights`.
        drawn: (train,) sampling probabilities of an epoch's images; None takes each image once.
        warn: called with warnings about images.
    """

    def __init__(
        self,
        net: Accelerated,
        train: Images,
        val: Images,
        record: Mapping[str, Any],
        target: Target,
        settings: Loss,
        *,
        weights: tuple[float, ...] | None = None,
        drawn: np.ndarray | None = None,
        warn: Callable[[str], object] = log.warning,
    ) -> None:
        super().__init__(net, net, train, val, record)
        self.warn, self._seen = warn, set[str]()
        self.target, self.settings, self.weights, self.drawn = target, settings, weights, drawn

    def order(self, count: int, generator: np.random.Generator) -> np.ndarray:
        return super().order(count, generator) if self.drawn is None else generator.choice(count, count, p=self.drawn)

    def look(self, batch: Sequence[dict[str, Any]]) -> None:
        """Warn once of each image whose pixels are all equal; called when the images have just been read."""
        for item in batch if self.group.speaks else ():
            for source in sources_of(item):
                name = _file_of(source, item)
                if name not in self._seen:
                    self._seen.add(name)
                    if is_blank(source):
                        self.warn(f"{name}: all its pixels are equal; a network cannot learn from it")

    def find(self, item: dict[str, Any]) -> Found:
        """The network's result for an image, in evaluation mode without gradients."""
        raise NotImplementedError

    def loss_of(self, found: Found) -> float:
        """The loss of an image with this result."""
        raise NotImplementedError

    def measures(self, found: Sequence[Found]) -> dict[str, float | int | None]:
        """Counts (`COUNTS`) and measures, or None for undefined ones; the first measure selects the best epoch."""
        raise NotImplementedError

    def predict(self, images: Images, stage: str) -> list[Found]:
        """The results of the images, in order; a collective of the process group."""
        self.module.eval()
        self.meter.start(stage, len(images))
        found = []
        with torch.no_grad():
            for index in range(self.group.turn, len(images), self.group.at_once):
                item = images[index]
                found.append(self.find(item))
                with np.errstate(invalid="ignore"):
                    known = math.isfinite(self.loss_of(found[-1]))
                if not known and (text := self.blame([item])):
                    raise DataError(text)
                self.look([item])
                self.meter.image_done()
        return self.group.in_order(found)

    def score(self) -> Score | None:
        """The score of the validation images; the negative loss if the measure is undefined."""
        if not len(self.val):
            return None
        found = self.predict(self.val, "validate")
        measures = {name: value for name, value in self.measures(found).items() if name not in COUNTS}
        # In float32, as in training, so that sums that processes round differently are equal.
        losses = np.array([self.loss_of(one) for one in found], np.float32)
        loss = float(np.mean(losses, dtype=np.float64))
        main, value = next(iter(measures.items()))
        score = -loss if value is None else float(value) * (-1 if main in SMALLER else 1)
        columns = {f"val_{name}": math.nan if one is None else float(one) for name, one in measures.items()}
        shown = {"val loss": loss, f"val {SHOWN[main]}": columns[f"val_{main}"]}
        # With few images many scores are equal: the loss decides.
        return Score(score, -loss, {"val_loss": loss, "val_score": score, **columns}, shown)

    def draw(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        from .curves import write_curves  # imports matplotlib, which predictions do not need

        write_curves(folder, rows)


def _file_of(source: PixelSource, item: Mapping[str, Any]) -> str:
    """The file of an image for messages; for an exam the file of the view."""
    stored = stored_source(source) if "views" in item else None
    return str(item["record"].path if stored is None else stored.name)
