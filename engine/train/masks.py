"""Masks learnt from images of any size: the loss by tiles, so that neither map nor mask is ever whole."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..accelerate import Accelerated
from ..datasets.masks import Batched, mask_on_grid
from ..datasets.tables import Record
from ..datasets.tables.cells import escape
from ..dense import dense_loss, map_shape
from ..errors import BudgetError
from ..files import write_atomically
from .curves import write_curves
from .data import Images, tell_epoch
from .mask_target import MaskLoss, MaskTarget, dice, dice_scores
from .options import Loss
from .task import Score, Task


@dataclass(frozen=True)
class Overlap:
    """What a prediction of one image has in common with its mask.

    Attributes:
        counts: (3, classes) pixels: of both, of the prediction, of the mask.
    """

    record: Record
    loss: float
    counts: np.ndarray


class Segmentation(Task):
    """A class for each pixel, learnt by a network that gives a map; the score is the mean Dice of the classes.

    Where the map is coarser than the image, the mask is brought to its grid: a cell has the class in its middle.

    Args:
        net: an accelerated network, pixel sources -> (N, classes, H', W').
        train: images of the epochs; told which one it is where they have a ``set_epoch``.
        val: images that choose the best epoch.
        record: what checkpoints say of the network.
        settings: of the loss.
        weights: of the classes in the loss, see `MaskTarget.weights`.
        drawn: (train,) probabilities by which an epoch's images are drawn; None takes each once.
    """

    def __init__(
        self,
        net: Accelerated,
        train: Images,
        val: Images,
        record: Mapping[str, Any],
        target: MaskTarget,
        settings: Loss,
        *,
        weights: Sequence[float] | None = None,
        drawn: np.ndarray | None = None,
    ) -> None:
        self.module, self.images, self.val, self.record = net, train, val, record
        self.target, self.drawn = target, drawn
        self._criterion = MaskLoss(len(target.names), settings, None if weights is None else tuple(weights))
        self._counting = MaskLoss(len(target.names), settings, self._criterion.weights, counted=True)
        self._net = net
        net.on_tile = lambda event: self.meter.on_tile(event)

    def examples(self, epoch: int) -> Any:
        tell_epoch(self.images, epoch)
        return self.images

    def order(self, count: int, generator: np.random.Generator) -> np.ndarray:
        return super().order(count, generator) if self.drawn is None else generator.choice(count, count, p=self.drawn)

    def loss(self, batch: Sequence[dict[str, Any]]) -> Tensor:
        return torch.stack([self._computed(item, self._criterion)[0] for item in batch]).mean()

    def _computed(self, item: dict[str, Any], criterion: MaskLoss) -> tuple[Tensor, ...]:
        """What the criterion says of an image.

        Raises:
            BudgetError: naming its file.
        """
        image = item["image"]
        self.meter.image(image.shape[-2] * image.shape[-1])
        mask = self.target.seen(item["record"], image)
        try:
            rows, columns = map_shape(self._net, image)[-2:]
            return dense_loss(self._net, image, Batched(mask_on_grid(mask, (rows, columns))), criterion)
        except BudgetError as error:  # the larger images of a set may not fit
            raise BudgetError(f"{item['record'].path}: {error}") from error

    def score(self) -> Score | None:
        if not len(self.val):
            return None
        found = self.measure(self.val, "validate")
        loss = float(np.mean(np.array([one.loss for one in found], np.float32), dtype=np.float64))
        measures = mask_scores(found, self.target)
        mean = measures["dice"]
        score = -loss if mean is None else mean
        columns = {f"val_{name}": math.nan if one is None else float(one) for name, one in measures.items()}
        del columns["val_images"]
        return Score(
            score,
            -loss,
            {"val_loss": loss, "val_score": score, **columns},
            {"val loss": loss, "val Dice": columns["val_dice"]},
        )

    def end_epoch(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        write_curves(folder, rows)

    def measure(self, images: Images, stage: str) -> list[Overlap]:
        """Of the images, in order; a collective of the process group."""
        self.module.eval()
        self.meter.start(stage, len(images))
        found = []
        with torch.no_grad():
            for index in range(self.group.turn, len(images), self.group.at_once):
                item = images[index]
                loss, counts = self._computed(item, self._counting)
                found.append(Overlap(item["record"], float(loss), counts.cpu().numpy()))
                self.meter.image_done()
        return self.group.in_order(found)


def mask_scores(found: Sequence[Overlap], target: MaskTarget) -> dict[str, float | int | None]:
    """The `dice_scores` of some images."""
    return dice_scores(np.sum([one.counts for one in found], 0), len(found), target.names)


def write_overlaps(path: Path, found: Sequence[Overlap], names: Sequence[str]) -> None:
    """A row for each image: Dice of each class but the background, empty where neither mask nor prediction has it."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image_path", "patient_id", *(f"dice_{name}" for name in names[1:])])
            for one in found:
                patient = one.record.patient_id if one.record.patient_known else ""
                values = ["" if np.isnan(value) else repr(float(value)) for value in dice(one.counts)[1:]]
                writer.writerow([escape(cell) for cell in (str(one.record.path), patient, *values)])

    write_atomically(path, write, "table")


def scored_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Lines of a model card: the Dice of each class in each split that was held out."""
    lines = []
    for split in ("val", "test"):
        for name, value in metrics.get(split, {}).items():
            if name.startswith("dice_"):
                told = "undefined, no mask has it" if value is None else f"{value:.4f}"
                lines.append(f"- {split}, {name.removeprefix('dice_')}: Dice {told}, {metrics[split]['images']} images")
    return lines and [*lines, "", "Dice of the pixels of all images together, without an interval."]
