"""Masks of images: a class for each pixel, read by region and transformed with the image.

A mask is an image of one channel in the stored size of its image: 0 is the background, k is class k, and 255 is
ignored. If all masks of a table contain 0 and 255 only, as many programs write them, 255 is class 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..errors import DataError
from ..images.affine import CoordinateMap
from ..images.open import open_pixels
from ..images.pixels import ImageSource, PixelSource
from ..images.stored import StoredPixels
from .augment import IntensitySource
from .dataset import open_record
from .tables import Record
from .views import DownsampledSource, MirroredSource, NormalizedSource, SampledSource

IGNORED = 255
"""The value of ignored pixels: neither trained on nor scored."""
_STRIP = 512


def read_inside(path: Path) -> np.ndarray:
    """The pixels inside the finding of a mask file, bool (rows, columns), in the orientation of the file."""
    source, level = open_inside(path)
    return (source.read(0, source.shape[1], 0, source.shape[2]).amax(0) > level).numpy()


def open_inside(path: Path) -> tuple[ImageSource, float]:
    """A mask of a finding, and the grey value above which pixels are inside: 0, or half of white for lossy JPEG."""
    source = open_pixels(path, voi="none", flip=False)
    return source, 0.5 if source.steps[0].startswith("JPEG") else 0.0


class Mask(Protocol):
    """Classes of pixels, read by region; with a batch axis (`Batched`) the labels of `dense_loss`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """uint8 (bottom - top, right - left)."""
        ...


@dataclass(frozen=True)
class Classes:
    """The meaning of mask values.

    Attributes:
        names: the names of the classes 0, 1, ...; the first is the background.
        binary: whether 255 is class 1 instead of ignored.
    """

    names: tuple[str, ...]
    binary: bool = False


class FileMask:
    """A mask as its files store it; for several files (a mask per finding) the largest value counts.

    Raises:
        DataError: if a file is missing, has several channels, or differs from another file in size.
    """

    def __init__(self, record: Record, classes: Classes | None = None) -> None:
        self._classes = classes
        self._files = [_stored(path) for path in masks_of(record)]
        if not self._files:
            raise DataError(f"{record.path}: has no mask; add one in the column mask_path, or leave the image out")
        for path, file in zip(masks_of(record), self._files, strict=True):
            if file.shape[0] != 1:
                raise DataError(f"{path}: has {file.shape[0]} channels; a mask must have one, with class numbers")
            if file.shape != self._files[0].shape:
                raise DataError(f"{path}: is {_sides(file)}, but another mask of the image {_sides(self._files[0])}")
        self.path = masks_of(record)[0]
        height, width = self._files[0].shape[-2:]
        self.shape = height, width

    def require_size(self, image: PixelSource) -> None:
        """Raise an error if the mask and the stored image differ in size.

        Raises:
            DataError: names both sizes.
        """
        while not isinstance(image, ImageSource):
            image = _below(image)
        height, width = image.stored.shape[-2:]
        if (height, width) != self.shape:
            raise DataError(f"{self.path}: is {_sides(self._files[0])}, but its image {height} x {width}; correct it")

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """As in `Mask`.

        Raises:
            DataError: if a value is not a class.
        """
        found = self._values(top, bottom, left, right)
        if self._classes is None:
            return found
        if self._classes.binary:
            found = np.where(found == IGNORED, np.uint8(1), found)
        wrong = found[(found >= len(self._classes.names)) & (found != IGNORED)]
        if wrong.size:
            raise DataError(_class_error(self.path, int(wrong[0]), self._classes))
        return found

    def _values(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        parts = [np.asarray(file.read(top, bottom, left, right))[0] for file in self._files]
        for part in parts:
            if part.dtype == np.uint8:
                continue
            odd = part[~((part >= 0) & (part <= 255) & (part == np.floor(part)))]
            if odd.size:
                raise DataError(f"{self.path}: contains {odd[0]}, which is not a class; classes are 0, 1, ... 254")
        whole = [part.astype(np.uint8) for part in parts]
        return whole[0] if len(whole) == 1 else np.maximum.reduce(whole)

    def counts(self) -> np.ndarray:
        """The number of pixels of each value, (256,) int64."""
        found = np.zeros(256, np.int64)
        for top, bottom in strips(self.shape[0]):
            found += np.bincount(self.read(top, bottom, 0, self.shape[1]).ravel(), minlength=256)
        return found


def masks_of(record: Record) -> list[Path]:
    """The mask files of an image, from its findings; the column mask_path is a finding too."""
    return [finding.mask for finding in record.findings if finding.mask is not None]


def strips(height: int) -> list[tuple[int, int]]:
    """Row ranges (top, bottom) in which a mask is read strip by strip."""
    return [(top, min(top + _STRIP, height)) for top in range(0, height, _STRIP)]


def highest(mask: Mask, factor: int) -> np.ndarray:
    """The highest class of each block of factor x factor pixels, uint8 (rows, columns), so that small regions remain.

    Ignored pixels count as background; blocks at the lower and right border may be smaller.
    """
    step = max(1, _STRIP // factor) * factor
    height, width = mask.shape
    return np.concatenate(
        [highest_of(mask.read(top, min(top + step, height), 0, width), factor) for top in range(0, height, step)]
    )


def highest_of(values: np.ndarray, factor: int) -> np.ndarray:
    """`highest` of an array of values, (rows, columns)."""
    values = np.where(values == IGNORED, np.uint8(0), values)
    if factor > 1:
        for axis in (0, 1):
            values = np.maximum.reduceat(values, np.arange(0, values.shape[axis], factor), axis)
    return values


def count_values(record: Record, names: Sequence[str] = ()) -> np.ndarray:
    """The number of pixels of each value of an image's mask, (256,) int64.

    Args:
        record: the image.
        names: the names of the classes; empty accepts each value as a class.

    Raises:
        DataError: for the problems that `FileMask` raises, or if a value is not a class.
    """
    mask = FileMask(record)
    mask.require_size(open_record(record, flip=False, for_processing=True))
    found = mask.counts()
    wrong = [int(value) for value in np.flatnonzero(found) if names and len(names) <= value != IGNORED]
    if wrong:
        raise DataError(_class_error(mask.path, wrong[0], Classes(tuple(names))))
    return found


def classes_of(counts: dict[Path, np.ndarray], names: Sequence[str]) -> Classes:
    """The meaning of mask values, derived from the number of pixels of each value.

    Args:
        counts: the counts of each image's mask, see `count_values`.
        names: the names of the classes; empty for background and the numbers that the masks contain.

    Raises:
        DataError: if there are too many or too few names, a mask is ignored everywhere, or there is only one class.
    """
    if names and not 2 <= len(names) <= IGNORED:
        raise DataError(f"{len(names)} classes; there must be 2 to {IGNORED}, the first one for the background (0)")
    there = np.flatnonzero(np.sum(list(counts.values()), 0))
    if set(there.tolist()) == {0, IGNORED} and len(names) in (0, 2):
        return Classes(tuple(names) or ("background", "1"), binary=True)
    judged = there[there != IGNORED]
    if not names:
        if len(judged) < 2:
            only = f"value {judged[0]}" if len(judged) else "255, which is ignored"
            raise DataError(f"all masks contain only {only}; training needs another class")
        absent = sorted(set(range(int(judged[-1]))) - {0, *judged.tolist()})
        if absent:
            last = next(path for path, found in counts.items() if found[judged[-1]])
            raise DataError(
                f"{last}: contains {judged[-1]}, but no mask contains {absent[0]}; correct it, or name all classes: "
                "-o 'data.classes=[\"background\", ...]'"
            )
        names = ["background", *(str(number) for number in range(1, int(judged[-1]) + 1))]
    classes = Classes(tuple(names))
    for path, found in counts.items():
        if not found[:IGNORED].any():
            raise DataError(f"{path}: mask is 255 everywhere, which is ignored; leave the image out")
    return classes


def _class_error(path: Path, value: int, classes: Classes) -> str:
    named = ", ".join(f"{number} {name}" for number, name in enumerate(classes.names))
    return f"{path}: contains {value}, which is not a class; classes are {named}, and 255 for ignored pixels"


def _stored(path: Path) -> StoredPixels:
    try:
        return open_pixels(path, voi="none", flip=False, for_processing=True).stored
    except DataError as error:
        if not path.exists():
            raise DataError(f"{path}: no such mask") from error
        raise


def _sides(stored: StoredPixels) -> str:
    return f"{stored.shape[1]} x {stored.shape[2]}"


class PickedMask:
    """A mask whose rows and columns are picked from another mask: mirrored, of lower resolution, or on another grid.

    Args:
        mask: the other mask.
        rows, columns: the index in the other mask for each row and column.
    """

    def __init__(self, mask: Mask, rows: np.ndarray, columns: np.ndarray) -> None:
        self._mask, self._rows, self._columns = mask, rows, columns
        self.shape = (len(rows), len(columns))

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        rows, columns = self._rows[top:bottom], self._columns[left:right]
        if not rows.size or not columns.size:
            return np.empty((len(rows), len(columns)), np.uint8)
        first, start = int(rows.min()), int(columns.min())
        values = self._mask.read(first, int(rows.max()) + 1, start, int(columns.max()) + 1)
        return values[np.ix_(rows - first, columns - start)]


class SampledMask:
    """A mask resampled by a coordinate map: the class at the mapped point, 255 beyond the border of the other mask.

    Args:
        mask: the other mask.
        back: from this mask's coordinates to those of the other mask.
    """

    def __init__(self, mask: Mask, back: CoordinateMap) -> None:
        self._mask, self._back, self.shape = mask, back, mask.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        rows, columns = (axis.astype(np.float64) + 0.5 for axis in np.ogrid[top:bottom, left:right])
        x, y = np.broadcast_arrays(*self._back.at(columns, rows))
        i, j = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
        inside = (i >= 0) & (i < self.shape[0]) & (j >= 0) & (j < self.shape[1])
        found = np.full(inside.shape, IGNORED, np.uint8)
        if inside.any():
            i, j = i[inside], j[inside]
            first, start = int(i.min()), int(j.min())
            values = self._mask.read(first, int(i.max()) + 1, start, int(j.max()) + 1)
            found[inside] = values[i - first, j - start]
        return found


class Batched:
    """A mask as the labels of a batch of one image, int64 (1, rows, columns)."""

    def __init__(self, mask: Mask) -> None:
        self._mask, self.shape = mask, (1, *mask.shape)

    def read(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        """int64 (1, bottom - top, right - left)."""
        return torch.from_numpy(self._mask.read(top, bottom, left, right).astype(np.int64))[None]


def mask_as_seen(mask: Mask, image: PixelSource) -> Mask:
    """A mask in its image's stored size, transformed like the image: mirrored, averaged, augmented.

    A pixel that is the mean of a block has the class at the block's centre; a moved pixel keeps its class.

    Raises:
        DataError: if the image has a step that masks do not support.
    """
    if isinstance(image, ImageSource):
        return PickedMask(mask, *_mirrored(image))
    mask = mask_as_seen(mask, _below(image))
    if isinstance(image, MirroredSource):
        rows, columns = (np.arange(side) for side in mask.shape)
        return PickedMask(mask, rows[:: -1 if image.up_down else 1], columns[:: -1 if image.left_right else 1])
    if isinstance(image, SampledSource):
        return SampledMask(mask, image.back)
    if isinstance(image, DownsampledSource):
        rows, columns = (np.arange(side) * image.factor + image.factor // 2 for side in image.shape[1:])
        return PickedMask(mask, rows, columns)
    return mask


def mask_on_grid(mask: Mask, shape: tuple[int, int]) -> Mask:
    """A mask on another grid over the same image: the class at the centre of each cell.

    It equals ``torch.nn.functional.interpolate(mask, shape, mode="nearest-exact")``.
    """
    return mask if mask.shape == shape else PickedMask(mask, *_cells(mask.shape, shape))


def mask_as_stored(mask: Mask, image: PixelSource) -> Mask:
    """A mask on a grid over a network's input, in the size of the image's file: the inverse of `mask_as_seen`.

    Args:
        mask: the mask on the grid.
        image: the network's input, without augmentation.
    """
    factor = 1
    while not isinstance(image, ImageSource):
        if isinstance(image, DownsampledSource):
            factor *= image.factor
        image = _below(image)
    seen = tuple(side // factor for side in image.shape[1:])
    # Rows beyond the last whole block are not in the input; they get the class of the last row.
    rows, columns = (np.minimum(np.arange(side) // factor, side // factor - 1) for side in image.shape[1:])
    whole = PickedMask(mask_on_grid(mask, (seen[0], seen[1])), rows, columns)
    return PickedMask(whole, *_mirrored(image))


def _below(image: PixelSource) -> PixelSource:
    """The source of a mirrored, averaged or augmented image."""
    if isinstance(image, MirroredSource | SampledSource | DownsampledSource | IntensitySource | NormalizedSource):
        return image.source
    raise DataError(f"{image.name}: masks do not support the step {type(image).__name__} of their image")


def _mirrored(image: ImageSource) -> tuple[np.ndarray, np.ndarray]:
    back = image.to_original
    rows, columns = (np.arange(side) for side in image.shape[1:])
    return rows[:: -1 if back.yy < 0 else 1], columns[:: -1 if back.xx < 0 else 1]


def _cells(have: tuple[int, int], want: tuple[int, int]) -> list[np.ndarray]:
    """For each axis, the index of the `have` cell at the centre of each `want` cell, in exact integer arithmetic."""
    return [(2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(have, want, strict=True)]
