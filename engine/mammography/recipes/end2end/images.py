"""Images at the size of the method, their lesions, and patches as pixel sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from ....datasets.augment import Augment, augmented
from ....datasets.dataset import ImageDataset, open_record
from ....datasets.masks import open_inside, read_inside
from ....datasets.tables import Finding, Record
from ....datasets.tables.generic import is_absent
from ....errors import DataError
from ....files import write_atomically
from ....images.open import open_pixels
from ....images.pixels import PixelSource
from ..sized import PaddedRegion, Size, open_images, read_sized
from .config import CLASSES, End2EndConfig, Sampling

Mask = NDArray[np.bool_]
_TRIES = 1000  # consecutive failures before the rule is relaxed


@dataclass(frozen=True)
class LesionMask:
    """One lesion of an image."""

    mask: Mask
    """(height, width)."""
    label: int
    """Index into `CLASSES`, 1 to 4."""


@dataclass(frozen=True)
class Patch:
    """A square of an image, which may extend beyond it."""

    top: int
    left: int
    label: int
    cutoff: float
    """The required overlap: as configured, or lower if that was not found; 0 for a centroid's."""


def breast_box(image: NDArray[np.float32]) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of the largest part (height, width) brighter than 5 % of the maximum."""
    parts, count = ndimage.label(image > 0.05 * image.max())  # pyright: ignore[reportGeneralTypeIssues]
    if not count:
        return 0, image.shape[0], 0, image.shape[1]
    largest = 1 + int(np.bincount(parts.ravel())[1:].argmax())
    rows, columns = ndimage.find_objects(parts)[largest - 1]
    return rows.start, rows.stop, columns.start, columns.stop


def sample(
    box: tuple[int, int, int, int], lesions: Sequence[LesionMask], sampling: Sampling, rng: np.random.Generator
) -> list[Patch]:
    """Sample the patches of an image: those of each lesion in order, then background (Shen et al., 2019).

    It follows the published rules with three differences: background must not overlap *any* lesion of an image, instead
    of only the first; every image has its own random numbers; and the patch of a lesion's centroid needs no option.

    Args:
        box: of the breast, see `breast_box`; it contains the centres of background patches.
        lesions: their masks have one shape.

    Raises:
        DataError: a lesion's mask is empty.
    """
    tables = [_Overlap(lesion.mask, sampling.side) for lesion in lesions]
    patches = []
    for lesion, table in zip(lesions, tables, strict=True):
        rows, columns = np.nonzero(lesion.mask)
        if not len(rows):
            raise DataError(f"the mask of a lesion ({CLASSES[lesion.label]}) is empty; remove the finding")
        if sampling.per_lesion == 1:
            centre = round(rows.mean()), round(columns.mean())
            patches.append(_patch_around(centre, sampling.side, lesion.label, 0.0))
            continue
        found, failures, cutoff = 0, 0, sampling.positive
        while found < sampling.per_lesion:
            centre = int(rng.integers(rows.min(), rows.max() + 1)), int(rng.integers(columns.min(), columns.max() + 1))
            patch = _patch_around(centre, sampling.side, lesion.label, cutoff)
            if table.share(patch) > cutoff:
                patches.append(patch)
                found, failures = found + 1, 0
                continue
            failures += 1
            if failures == _TRIES:
                cutoff, failures = max(cutoff - 0.05, 0.0), 0
    found, failures = 0, 0
    while found < sampling.background and failures < _TRIES:  # a breast with many lesions may have less background
        centre = int(rng.integers(box[0], box[1])), int(rng.integers(box[2], box[3]))
        patch = _patch_around(centre, sampling.side, 0, sampling.negative)
        if all(table.share(patch) <= sampling.negative for table in tables):
            patches.append(patch)
            found, failures = found + 1, 0
        else:
            failures += 1
    return patches


def _patch_around(centre: tuple[int, int], side: int, label: int, cutoff: float) -> Patch:
    return Patch(centre[0] - side // 2, centre[1] - side // 2, label, cutoff)


class _Overlap:
    """The share of a lesion in a patch: sums of the mask over rectangles from a table of partial sums."""

    def __init__(self, mask: Mask, side: int) -> None:
        self._sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
        self._sums[1:, 1:] = mask.cumsum(0).cumsum(1)
        self._side = side

    def share(self, patch: Patch) -> float:
        """Return the overlap as a share of the lesion or of the patch, whichever is larger."""
        height, width = self._sums.shape[0] - 1, self._sums.shape[1] - 1
        top, bottom = (min(max(v, 0), height) for v in (patch.top, patch.top + self._side))
        left, right = (min(max(v, 0), width) for v in (patch.left, patch.left + self._side))
        s = self._sums
        common = int(s[bottom, right] - s[top, right] - s[bottom, left] + s[top, left])
        return common / min(int(s[-1, -1]), self._side**2) if s[-1, -1] else 0.0


_FULL = 65535
_SCALE_TOLERANCE = 0.03  # allowed difference in the scales of a mask's sides


def open_unmirrored(record: Record, config: End2EndConfig) -> PixelSource:
    """Open the image without mirroring, so that findings are at the table's coordinates."""
    return open_record(record, voi=config.voi, flip=False, channels=config.channels)


def write_resized(records: Sequence[Record], config: End2EndConfig, folder: Path) -> list[Record]:
    """Write images at the configured size once as 16-bit ``.npy``; at native size, return the records themselves.

    Files are written atomically, so that an interrupted run continues with the missing images.
    """
    if not config.resize:
        return list(records)
    made = []
    for number, record in enumerate(records):
        path = folder / f"{number:06d}.npy"
        if not path.exists():
            image = read_sized(open_unmirrored(record, replace(config, channels=1)), Size(config.resize))
            pixels = (image[0].clamp(0, 1) * _FULL).round().numpy().astype(np.uint16)
            write_atomically(path, lambda p, pixels=pixels: np.save(p, pixels), "image")
        made.append(replace(record, path=path, frame=None, white=None))
    return made


def check_findings(records: Sequence[Record]) -> None:
    """Refuse lesions without a valid location, before any image is read.

    Raises:
        DataError: a finding has neither mask nor box, its mask is missing or of another shape, or its box is outside
            the image.
    """
    for record in records:
        for finding in record.findings:
            if finding.pathology and finding.mask is not None:
                if is_absent(finding.mask):
                    raise DataError(f"{finding.mask}: the mask of {record.path.name} is missing; remove the finding")
                _check_shape(finding.mask, record)
            elif finding.pathology and finding.box is not None:
                top, bottom, left, right = finding.box
                height, width = open_pixels(record.path, flip=False, frame=record.frame).shape[1:]
                if max(top, 0) >= min(bottom, height) or max(left, 0) >= min(right, width):
                    raise DataError(
                        f"{record.path}: a finding's box (rows {top} to {bottom}, columns {left} to {right}) is "
                        f"outside the image of {height} x {width} pixels; correct it, or remove the finding"
                    )
            elif finding.pathology:
                raise _no_location(record)


def _check_shape(path: Path, record: Record) -> None:
    """Refuse a mask that does not cover the whole image; CBIS-DDSM's masks differ by a few rows."""
    image, mask = open_pixels(record.path, flip=False, frame=record.frame).shape[1:], open_inside(path)[0].shape[1:]
    down, across = (own / whole for own, whole in zip(mask, image, strict=True))
    if max(down, across) > (1 + _SCALE_TOLERANCE) * min(down, across):
        raise DataError(
            f"{path}: is {mask[0]} x {mask[1]}, its image {image[0]} x {image[1]}, so it does not cover all of it; "
            "correct the mask, or remove the finding"
        )


def _no_location(record: Record) -> DataError:
    return DataError(f"{record.path}: a finding has neither mask nor box; add one, or remove the finding")


def lesions(record: Record, shape: tuple[int, int]) -> list[LesionMask]:
    """Return the lesions of an image from its findings, as masks of ``shape``; findings without pathology are omitted.

    A finding's mask is its mask file, or else its box. Kinds that begin with calc are calcifications, others masses.

    Raises:
        DataError: a finding has neither mask nor box, or no part of it is in the image.
    """
    found = []
    for finding in record.findings:
        if finding.pathology:
            label = CLASSES.index(
                ("calc" if finding.kind.startswith("calc") else "mass")
                + ("_mal" if finding.pathology.startswith("malignant") else "_ben")
            )
            mask = _mask(finding, record, shape)
            if not mask.any():
                what = f"contains no pixel of a lesion ({CLASSES[label]})"
                raise DataError(f"{finding.mask or record.path}: {what}; remove the finding")
            found.append(LesionMask(mask, label))
    return found


def _mask(finding: Finding, record: Record, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if finding.mask is not None:
        mask = torch.from_numpy(read_inside(finding.mask))[None, None]
    elif finding.box is not None:
        source = open_pixels(record.path, flip=False, frame=record.frame)
        mask = torch.zeros(1, 1, *source.shape[1:], dtype=torch.bool)
        mask[..., finding.box[0] : finding.box[1], finding.box[2] : finding.box[3]] = True
    else:
        raise _no_location(record)
    small = F.interpolate(mask.to(torch.uint8), shape, mode="nearest")
    if not small.any():  # a lesion smaller than a pixel
        small = F.adaptive_max_pool2d(mask.float(), shape)
    return small[0, 0].numpy().astype(bool)


ImagePatch = tuple[int, Patch]
"""The number of an image, and a patch of it."""


def sample_all(
    originals: Sequence[Record], records: Sequence[Record], config: End2EndConfig, seed: int
) -> list[ImagePatch]:
    """Sample the patches of images; every image has its own random numbers.

    Args:
        originals: records with findings in pixels of their files.
        records: the same images at the configured size.
    """
    places = []
    for number, (original, record) in enumerate(zip(originals, records, strict=True)):
        source = open_unmirrored(record, replace(config, channels=1))
        image = source.read(0, source.shape[1], 0, source.shape[2])[0].numpy()
        rng = np.random.default_rng([seed, number])
        found = sample(breast_box(image), lesions(original, image.shape), config.sampling, rng)
        places += [(number, patch) for patch in found]
    return places


class Patches:
    """Patches of images as a sequence of (pixels (C, side, side) float32, class); augmented again in each epoch."""

    def __init__(
        self,
        records: Sequence[Record],
        places: Sequence[ImagePatch],
        config: End2EndConfig,
        *,
        augment: bool,
        seed: int = 0,
    ) -> None:
        self.records, self.places, self.config, self.seed, self.epoch = records, places, config, seed, 0
        self.augment = Augment.parse(config.augment) if augment and config.augment else None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        (image, patch), side = self.places[index], self.config.sampling.side
        # All channels are the grey values: only one is augmented, which takes most of the time.
        source: PixelSource = open_unmirrored(self.records[image], replace(self.config, channels=1))
        source = PaddedRegion(source, patch.top, patch.left, side)
        if self.augment is not None:
            source = augmented(source, self.augment, seed=self.seed, epoch=self.epoch, index=index)
        grey = source.read(0, side, 0, side)
        mean, std = (torch.tensor(own)[:, None, None] for own in (self.config.mean, self.config.std))
        return ((grey - mean) / std).expand(self.config.channels, -1, -1), patch.label


def whole_images(records: Sequence[Record], config: End2EndConfig, **options: Any) -> ImageDataset:
    """Return the images for the whole-image network, which already have its size; options as in `open_images`."""
    return open_images(records, config, flip=False, **options)
