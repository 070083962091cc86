"""Tasks on images of any size: how these are taken, and what validation images say of an epoch."""

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
from ..images.derived import stored_source
from ..images.pixels import PixelSource
from .data import Images, tell_epoch
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
        net: what computes it, accelerated.
        train: images of the epochs; told which one it is where they have a ``set_epoch``.
        val: images that choose the best epoch.
        record: what checkpoints say of the network.
    """

    def __init__(
        self, module: nn.Module, net: Accelerated, train: Images, val: Images, record: Mapping[str, Any]
    ) -> None:
        self.module, self.net, self.images, self.val, self.record = module, net, train, val, record
        net.on_tile = lambda event: self.meter.on_tile(event)

    def examples(self, epoch: int) -> Any:
        tell_epoch(self.images, epoch)
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
    """What `gigamorph train` learns of a table; derived classes have the loss, and what is ``Found`` of an image.

    Args:
        net, train, val, record: see `ImageTask`.
        target: what is learnt.
        settings: of the loss.
        weights: of the classes in the loss, see `Target.weights`.
        drawn: (train,) probabilities by which an epoch's images are drawn; None takes each once.
        warn: called with what people should know of an image.
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
        """Tell of images all of whose pixels are equal, each once, when they have just been read anyway."""
        for item in batch if self.group.speaks else ():
            for source in sources_of(item):
                name = _file_of(source, item)
                if name not in self._seen:
                    self._seen.add(name)
                    if is_blank(source):
                        self.warn(f"{name}: all its pixels are equal; a network learns nothing from it")

    def find(self, item: dict[str, Any]) -> Found:
        """What the network says of an image, in evaluation mode without gradients."""
        raise NotImplementedError

    def loss_of(self, found: Found) -> float:
        """Of an image, of which this was found."""
        raise NotImplementedError

    def measures(self, found: Sequence[Found]) -> dict[str, float | int | None]:
        """Counts (`COUNTS`) and measures, of which the first chooses the best epoch; None where not defined."""
        raise NotImplementedError

    def predict(self, images: Images, stage: str) -> list[Found]:
        """What is found of the images, in order; a collective of the process group."""
        self.module.eval()
        self.meter.start(stage, len(images))
        found = []
        with torch.no_grad():
            for index in range(self.group.turn, len(images), self.group.at_once):
                item = images[index]
                found.append(self.find(item))
                with np.errstate(invalid="ignore"):
                    known = math.isfinite(self.loss_of(found[-1]))
                if not known and (told := self.blame([item])):
                    raise DataError(told)
                self.look([item])
                self.meter.image_done()
        return self.group.in_order(found)

    def score(self) -> Score | None:
        """By the loss where the measure is not defined."""
        if not len(self.val):
            return None
        found = self.predict(self.val, "validate")
        measures = {name: value for name, value in self.measures(found).items() if name not in COUNTS}
        # In float32, as in training, so that sums that processes round otherwise are equal.
        losses = np.array([self.loss_of(one) for one in found], np.float32)
        loss = float(np.mean(losses, dtype=np.float64))
        main, value = next(iter(measures.items()))
        score = -loss if value is None else float(value) * (-1 if main in SMALLER else 1)
        columns = {f"val_{name}": math.nan if one is None else float(one) for name, one in measures.items()}
        shown = {"val loss": loss, f"val {SHOWN[main]}": columns[f"val_{main}"]}
        # Few images make many equal scores: the loss decides between them.
        return Score(score, -loss, {"val_loss": loss, "val_score": score, **columns}, shown)

    def draw(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        from .curves import write_curves  # with matplotlib, which a prediction does without

        write_curves(folder, rows)


def _file_of(source: PixelSource, item: Mapping[str, Any]) -> str:
    """What messages call an image; of an exam the view's own file."""
    stored = stored_source(source) if "views" in item else None
    return str(item["record"].path if stored is None else stored.name)
