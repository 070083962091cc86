"""What is learnt of images with masks: a class for each pixel. And how a table of them is read."""

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

from ..datasets.masks import IGNORED, Classes, FileMask, Mask, classes_of, count_values, mask_as_seen, masks_of
from ..datasets.tables import Record, read_table
from ..errors import DataError
from ..images.parallel import available_cpus
from ..images.pixels import PixelSource
from .options import Loss
from .target import Target

Array = np.ndarray
_ONE = 1e-12  # below which 1 - p counts as it, where an exponent under 1 has no derivative


@dataclass(frozen=True)
class MaskTarget(Target):
    """A class for each pixel; the network gives a map with a logit for each, of a softmax.

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
        """None: logits of a softmax, of each place."""
        return None

    @property
    def classes(self) -> Classes:
        """What the values of masks mean."""
        return Classes(self.names, self.binary)

    def knows(self, record: Record) -> bool:
        return bool(masks_of(record))

    def stored(self, record: Record, image: PixelSource) -> FileMask:
        """An image's mask, as stored.

        Raises:
            DataError: what is wrong with it.
        """
        mask = FileMask(record, self.classes)
        mask.require_size(image)
        return mask

    def seen(self, record: Record, image: PixelSource) -> Mask:
        """The mask where the pixels of the image are.

        Raises:
            DataError: what is wrong with it.
        """
        return mask_as_seen(self.stored(record, image), image)

    def weights(self, records: Sequence[Record]) -> tuple[float, ...]:
        """By which classes count so that all count the same, with mean 1 over the pixels that are judged."""
        pixels = self._pixels(records).sum(0)
        present = int((pixels > 0).sum())
        return tuple(float(pixels.sum() / (present * n)) if n else 0.0 for n in pixels)

    def rarity(self, records: Sequence[Record]) -> Array:
        """(images,) probabilities by which images with each class, and those of background alone, are equally
        frequent."""
        there = self._pixels(records)[:, 1:] > 0
        kinds = np.concatenate([there, ~there.any(1, keepdims=True)], 1).astype(np.float64)
        drawn = (kinds / np.maximum(kinds.sum(0), 1)).max(1)
        return drawn / drawn.sum()

    def _pixels(self, records: Sequence[Record]) -> Array:
        """(images, classes) of each."""
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
    """The images of a table that have masks, all of which are read once, and the classes in them; others are left out.

    Args:
        names: of the classes, the background's first; none takes numbers, as many as the masks have.
        check_files: refuse what cannot be used; otherwise it is left out, and told.
        bad: gets the images that are left out, and why.

    Raises:
        DataError: what is wrong with the table, or a mask that is missing, of another size, or of other classes.
    """
    read = read_table(table, labels=False, check_files=check_files).records
    records = [record for record in read if masks_of(record)]
    if not records:
        raise DataError(f"{table}: has no column mask_path, and no masks in findings; name each image's mask there")
    if len(records) < len(read):
        without = f"{len(read) - len(records)} of {len(read)} images have no mask, and are left out"
        warn(f"{without}; where there is nothing to mark, a mask of zeros teaches that")
    counts: dict[Path, np.ndarray] = {}
    kept = []
    with ThreadPoolExecutor(available_cpus()) as pool:
        for record, found in zip(records, pool.map(lambda one: _surveyed(one, names), records), strict=True):
            if isinstance(found, DataError):
                if check_files:
                    raise found
                warn(f"left out: {found}")
                bad[record.path] = str(found)
                continue
            path = masks_of(record)[0]
            counts[path] = found if path not in counts else counts[path] + found
            kept.append(record)
    if not kept:
        raise DataError(f"{table}: none of the {len(records)} masks can be used")
    classes = classes_of(counts, names)
    there = np.sum(list(counts.values()), 0)
    for number, name in enumerate(names if not classes.binary else ()):
        if not there[number]:
            warn(f"no mask holds {number}, the class {name}")
    if classes.binary:
        warn(f"the masks hold 0 and 255 alone: 255 is taken as class 1, {classes.names[1]}")
    return kept, MaskTarget(classes.names, binary=classes.binary)


def _surveyed(record: Record, names: Sequence[str]) -> np.ndarray | DataError:
    try:
        return count_values(record, names)
    except DataError as error:
        return error


@dataclass(frozen=True)
class MaskLoss:
    """Cross-entropy of a map with a mask, the mean over the pixels that are judged; a criterion for `dense_loss`.

    Equal to ``F.cross_entropy(logits, mask, weight, ignore_index=255, label_smoothing=...)``, but 0 where nothing is
    judged, as of an image that augmentation moved out of sight. With an exponent each pixel counts by (1 - p)^focal,
    p being the probability of its class.

    Attributes:
        weights: of the classes.
        counted: also count, see `__call__`.
    """

    classes: int
    settings: Loss
    weights: tuple[float, ...] | None = None
    counted: bool = False

    def __call__(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """The loss, a scalar; and where it counts (3, classes) float64 pixels: of mask and prediction both, of the
        prediction, of the mask, among those that are judged.

        Args:
            logits: (N, classes, H, W).
            mask: (N, H, W) int64.
        """
        own = [(mask == number).double().sum() for number in range(self.classes)]
        judged = sum(n if self.weights is None else n * w for n, w in zip(own, self.weights or own, strict=True))
        loss = self._total(logits, mask) / torch.clamp(judged, min=_ONE)  # type: ignore[call-overload]
        if not self.counted:
            return (loss,)
        found, kept = logits.detach().argmax(1), mask != IGNORED
        both = [((found == n) & (mask == n)).double().sum() for n in range(self.classes)]
        given = [((found == n) & kept).double().sum() for n in range(self.classes)]
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
    """A network with the loss of its map, for the plan of a step: its likeliest classes stand for the mask."""

    def __init__(self, net: nn.Module, classes: int, settings: Loss) -> None:
        super().__init__()
        self.net = net
        self._loss = MaskLoss(classes, settings)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return self._loss(logits, logits.detach().argmax(1))[0]


def dice(counts: np.ndarray) -> np.ndarray:
    """Dice's coefficient of each class, 2 |A and B| / (|A| + |B|), of counts (..., 3, classes) as of `MaskLoss`.

    NaN where a class is neither in the mask nor predicted.
    """
    both, given, own = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(given + own > 0, 2 * both / (given + own), np.nan)


def dice_scores(counts: np.ndarray, images: int, names: Sequence[str]) -> dict[str, float | int | None]:
    """Dice of each class but the background over the pixels of all images together, and their mean ("dice").

    None where no mask has the class.

    Args:
        counts: (3, classes), the sum of those of the images.
    """
    each = np.where(counts[2] > 0, dice(counts), np.nan)[1:].tolist()
    known = [value for value in each if not math.isnan(value)]
    named = {f"dice_{name}": None if math.isnan(value) else value for name, value in zip(names[1:], each, strict=True)}
    return {"images": images, "dice": sum(known) / len(known) if known else None, **named}
