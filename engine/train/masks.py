"""The segmentation task on images of any size: the loss is computed by tiles, without a complete map or mask."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets.masks import Batched, mask_on_grid
from ..datasets.tables import Record
from ..datasets.tables.cells import escape
from ..dense import dense_loss, map_shape
from ..errors import BudgetError
from ..files import write_atomically
from .image_task import TargetTask
from .mask_target import MaskLoss, MaskTarget, dice, dice_scores
from .options import Loss


@dataclass(frozen=True)
class Overlap:
    """The overlap of an image's prediction with its mask.

    Attributes:
        record: the image.
        loss: its loss.
        counts: (3, classes) pixels: in both, in the prediction, in the mask.
    """

    record: Record
    loss: float
    counts: np.ndarray


class Segmentation(TargetTask[Overlap]):
    """Trains a network, pixel sources -> (N, classes, H', W'), for a class per pixel; the score is the mean Dice.

    If the map is coarser than the image, the mask is sampled at the centres of the map's cells.
    """

    target: MaskTarget

    def loss(self, batch: Sequence[dict[str, Any]]) -> Tensor:
        losses = [self._computed(item, self.settings)[0] for item in batch]
        self.look(batch)
        return torch.stack(losses).mean()

    def _computed(self, item: dict[str, Any], settings: Loss, counted: bool = False) -> tuple[Tensor, ...]:
        """The result of `MaskLoss` for an image.

        Raises:
            BudgetError: naming the image's file.
        """
        image = item["image"]
        self.meter.image(image.shape[-2] * image.shape[-1])
        mask = self.target.seen(item["record"], image)
        criterion = MaskLoss(len(self.target.names), settings, self.weights, counted)
        try:
            rows, columns = map_shape(self.net, image)[-2:]
            return dense_loss(self.net, image, Batched(mask_on_grid(mask, (rows, columns))), criterion)
        except BudgetError as error:  # the larger images of a set may not fit
            raise BudgetError(f"{item['record'].path}: {error}", error.needed_bytes) from error

    def find(self, item: dict[str, Any]) -> Overlap:
        loss, counts = self._computed(item, Loss(), counted=True)  # validation: class weights, but default settings
        return Overlap(item["record"], float(loss), counts.cpu().numpy())

    def loss_of(self, found: Overlap) -> float:
        return found.loss

    def measures(self, found: Sequence[Overlap]) -> dict[str, float | int | None]:
        return dice_scores(np.sum([one.counts for one in found], 0), len(found), self.target.names)


def write_overlaps(path: Path, found: Sequence[Overlap], names: Sequence[str]) -> None:
    """Write a row for each image: Dice of each class except the background, empty if undefined."""

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
    """Lines of a model card: the Dice of each class in each held-out split."""
    lines = []
    for split in ("val", "test"):
        for name, value in metrics.get(split, {}).items():
            if name.startswith("dice_"):
                text = "undefined, in no mask" if value is None else f"{value:.4f}"
                lines.append(f"- {split}, {name.removeprefix('dice_')}: Dice {text}, {metrics[split]['images']} images")
    return lines and [*lines, "", "Dice over the pixels of all images, without an interval."]
