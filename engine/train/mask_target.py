"""Segmentation: the target, a class for each pixel; its loss, computed by tiles; the table of masks; the task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..datasets.masks import (
    IGNORED,
    Batched,
    Classes,
    FileMask,
    Mask,
    classes_of,
    count_values,
    mask_as_seen,
    mask_on_grid,
    masks_of,
)
from ..datasets.tables import Record, read_table
from ..datasets.tables.cells import write_csv
from ..dense import dense_loss, map_shape
from ..errors import BudgetError, DataError
from ..images.parallel import available_cpus
from ..images.pixels import PixelSource
from .image_task import TargetTask
from .options import Loss
from .target import Target

Array = np.ndarray
_ONE = 1e-12  # lower bound of 1 - p, because an exponent below 1 has no derivative at 0


@dataclass(frozen=True)
class MaskTarget(Target):
    """A class for each pixel; the network returns a map with softmax logits of the classes.

    Attributes:
        binary: see `gigamorph.engine.datasets.masks.Classes`.
    """

    kind: Literal["masks"] = "masks"  # type: ignore[assignment]
    binary: bool = False

    def to_plain(self) -> dict[str, Any]:
        return {**super().to_plain(), "binary": self.binary}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> MaskTarget:
        return cls(tuple(values["names"]), binary=bool(values.get("binary")))

    @property
    def outputs(self) -> None:
        """None: softmax logits at each position."""
        return None

    @property
    def classes(self) -> Classes:
        """The meaning of the values in masks."""
        return Classes(self.names, self.binary)

    def knows(self, record: Record) -> bool:
        return bool(masks_of(record))

    def stored(self, record: Record, image: PixelSource) -> FileMask:
        """The stored mask of an image.

        Raises:
            DataError: if it is invalid.
        """
        mask = FileMask(record, self.classes)
        mask.require_size(image)
        return mask

    def seen(self, record: Record, image: PixelSource) -> Mask:
        """The mask, aligned with the pixels of the image that the network sees.

        Raises:
            DataError: if it is invalid.
        """
        return mask_as_seen(self.stored(record, image), image)

    def weights(self, records: Sequence[Record]) -> tuple[float, ...]:
        """Class weights that give all classes the same total weight, with mean 1 over the labelled pixels."""
        pixels = self._pixels(records).sum(0)
        present = int((pixels > 0).sum())
        return tuple(float(pixels.sum() / (present * n)) if n else 0.0 for n in pixels)

    def rarity(self, records: Sequence[Record]) -> Array:
        """Sampling probabilities (images,) that make images with each class, and those with only background, equally
        frequent."""
        there = self._pixels(records)[:, 1:] > 0
        kinds = np.concatenate([there, ~there.any(1, keepdims=True)], 1).astype(np.float64)
        drawn = (kinds / np.maximum(kinds.sum(0), 1)).max(1)
        return drawn / drawn.sum()

    def _pixels(self, records: Sequence[Record]) -> Array:
        """The number of pixels (images, classes) of each class."""
        with ThreadPoolExecutor(available_cpus()) as pool:
            counts = pool.map(lambda record: FileMask(record, self.classes).counts(), records)
            return np.array([one[: len(self.names)] for one in counts])


def read_masks(
    table: str | Path,
    names: Sequence[str],
    *,
    check_files: bool,
    warn: Callable[[str], object],
    bad: dict[Path, str],
) -> tuple[list[Record], MaskTarget]:
    """The images of a table that have masks, and the classes of the masks; reads every mask once.

    Args:
        table: path of the table.
        names: of the classes, background first; if empty, numbers for the values in the masks.
        check_files: raise an error for an unusable mask; otherwise leave the image out with a warning.
        warn: called with each warning.
        bad: is filled with the images that are left out, and the reasons.

    Raises:
        DataError: for errors in the table, or a mask that is missing or has another size or other classes.
    """
    read = read_table(table, labels=False, check_files=check_files).records
    records = [record for record in read if masks_of(record)]
    if not records:
        raise DataError(f"{table}: has no column mask_path and no masks in findings; enter each image's mask there")
    if len(records) < len(read):
        without = f"{len(read) - len(records)} of {len(read)} images have no mask and are left out"
        warn(f"{without}; use a mask of zeros for an image without findings")
    counts: dict[Path, np.ndarray] = {}
    used = []
    with ThreadPoolExecutor(available_cpus()) as pool:
        for record, found in zip(records, pool.map(lambda one: _survey_or_error(one, names), records), strict=True):
            if isinstance(found, DataError):
                if check_files:
                    raise found
                warn(f"left out: {found}")
                bad[record.path] = str(found)
                continue
            path = masks_of(record)[0]
            counts[path] = found if path not in counts else counts[path] + found
            used.append(record)
    if not used:
        raise DataError(f"{table}: none of the {len(records)} masks can be used")
    classes = classes_of(counts, names)
    there = np.sum(list(counts.values()), 0)
    for number, name in enumerate(names if not classes.binary else ()):
        if not there[number]:
            warn(f"no mask contains {number}, the class {name}")
    if classes.binary:
        warn(f"the masks contain only 0 and 255: 255 is read as class 1, {classes.names[1]}")
    return used, MaskTarget(classes.names, binary=classes.binary)


def _survey_or_error(record: Record, names: Sequence[str]) -> np.ndarray | DataError:
    try:
        return count_values(record, names)
    except DataError as error:
        return error


@dataclass(frozen=True)
class MaskLoss:
    """Mean cross-entropy of a map and a mask over the labelled pixels; a criterion for `dense_loss`.

    Equal to ``F.cross_entropy(logits, mask, weight, ignore_index=255, label_smoothing=...)``, but 0 without labelled
    pixels, for example if augmentation moved the image out of view. With an exponent, each pixel has the factor
    (1 - p)^focal, where p is the probability of its class.

    Attributes:
        classes: number of classes.
        settings: of the loss.
        weights: of the classes.
        counted: also return pixel counts, see `__call__`.
    """

    classes: int
    settings: Loss
    weights: tuple[float, ...] | None = None
    counted: bool = False

    def __call__(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """The loss, a scalar; and with `counted` the labelled pixels (3, classes), float64: in both mask and
        prediction, in the prediction, in the mask.

        Args:
            logits: (N, classes, H, W).
            mask: (N, H, W) int64.
        """
        own = [(mask == number).double().sum() for number in range(self.classes)]
        judged = sum(n if self.weights is None else n * w for n, w in zip(own, self.weights or own, strict=True))
        loss = self._total(logits, mask) / torch.clamp(judged, min=_ONE)  # type: ignore[call-overload]
        if not self.counted:
            return (loss,)
        found, used = logits.detach().argmax(1), mask != IGNORED
        both = [((found == n) & (mask == n)).double().sum() for n in range(self.classes)]
        given = [((found == n) & used).double().sum() for n in range(self.classes)]
        return loss, torch.stack([*both, *given, *own]).view(3, self.classes)

    def _total(self, logits: Tensor, mask: Tensor) -> Tensor:
        weight = None if self.weights is None else logits.new_tensor(self.weights)
        smoothing = self.settings.label_smoothing
        if not self.settings.focal:
            return F.cross_entropy(
                logits, mask, weight, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
            )
        own = -F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="none")
        each = F.cross_entropy(logits, mask, weight, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
        return (each * (1 - own.exp()).clamp(min=_ONE) ** self.settings.focal).sum()


class WithLoss(nn.Module):
    """A network with its loss, for planning a step: its most probable classes replace the mask."""

    def __init__(self, net: nn.Module, classes: int, settings: Loss) -> None:
        super().__init__()
        self.net = net
        self._loss = MaskLoss(classes, settings)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return self._loss(logits, logits.detach().argmax(1))[0]


def dice(counts: np.ndarray) -> np.ndarray:
    """The Dice coefficient of each class, 2 |A and B| / (|A| + |B|), from counts (..., 3, classes) of `MaskLoss`.

    NaN if a class is neither in the mask nor predicted.
    """
    both, given, own = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(given + own > 0, 2 * both / (given + own), np.nan)


def dice_cells(counts: np.ndarray) -> list[str]:
    """Cells of a table: the Dice of each class except the background, empty if undefined."""
    return ["" if np.isnan(value) else repr(value) for value in dice(counts)[1:].tolist()]


def dice_scores(counts: np.ndarray, images: int, names: Sequence[str]) -> dict[str, float | int | None]:
    """Dice of each class except the background over the pixels of all images, and their mean ("dice").

    None if no mask has the class.

    Args:
        counts: (3, classes), the sum over the images.
        images: number of images.
        names: of the classes.
    """
    each = np.where(counts[2] > 0, dice(counts), np.nan)[1:].tolist()
    known = [value for value in each if not math.isnan(value)]
    named = {f"dice_{name}": None if math.isnan(value) else value for name, value in zip(names[1:], each, strict=True)}
    return {"images": images, "dice": sum(known) / len(known) if known else None, **named}


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
    """Write a row for each image with its `dice_cells`."""
    rows = []
    for one in found:
        patient = one.record.patient_id if one.record.patient_known else ""
        rows.append([one.record.path, patient, *dice_cells(one.counts)])
    write_csv(path, ["image_path", "patient_id", *(f"dice_{name}" for name in names[1:])], rows)


def scored_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Lines of a model card: the Dice of each class in each held-out split."""
    lines = []
    for split in ("val", "test"):
        for name, value in metrics.get(split, {}).items():
            if name.startswith("dice_"):
                text = "undefined, in no mask" if value is None else f"{value:.4f}"
                lines.append(f"- {split}, {name.removeprefix('dice_')}: Dice {text}, {metrics[split]['images']} images")
    return lines and [*lines, "", "Dice over the pixels of all images, without an interval."]
