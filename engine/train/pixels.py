"""Pixels of training images: NaN or infinite values, constant images, mean and standard deviation, unreadable files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..datasets.dataset import ImageDataset
from ..datasets.tables import Record
from ..errors import DataError
from ..images.levels import require_numbers, sample_rows
from ..images.parallel import run_parallel
from ..images.pixels import Normalize, PixelSource, stored_source

_ROWS, _FIRST = 256, 16


def sources_of(item: Mapping[str, Any]) -> Sequence[PixelSource]:
    """The image of a data set's item, or all views of its exam."""
    return item.get("views") or [item["image"]]


def read_through(source: PixelSource, name: str) -> None:
    """Read a complete image as the network does.

    Raises:
        DataError: if it cannot be read, or has pixels that are NaN or infinite.
    """
    height, width = source.shape[-2:]
    for top in range(0, height, _ROWS):
        require_numbers(source.read(top, min(top + _ROWS, height), 0, width), f"{name}: ")


def is_blank(source: PixelSource) -> bool:
    """Whether each channel of the file is constant; for most images a few rows in the middle suffice."""
    found = stored_source(source)
    if found is None:
        return False
    stored = found.stored
    height, width = stored.shape[-2:]
    value = None
    middle = height // 2
    for top, bottom in [(middle, min(middle + _FIRST, height)), *((t, t + _ROWS) for t in range(0, height, _ROWS))]:
        strip = np.asarray(stored.read(top, min(bottom, height), 0, width))
        value = strip[..., :1, :1] if value is None else value
        if (strip != value).any():
            return False
    return True


SAMPLED_IMAGES = 32


def normalize_of(images: ImageDataset, count: int = SAMPLED_IMAGES) -> Normalize:
    """Mean and standard deviation of the grey values, per colour channel; all images have equal weight.

    At most ``count`` images, spread over the table, are sampled, with at most a thousand rows each. The sample is taken
    from all pixels that the network sees, like nnU-Net's fingerprint of a data set.

    Raises:
        DataError: if no image can be read, all pixels are equal, or a pixel is NaN or infinite.
    """
    chosen = sorted({round(number) for number in np.linspace(0, len(images) - 1, count)}) if len(images) else []
    means, squares, error = [], [], None
    for number in chosen:
        try:
            source = images.opened(images.records[number], None)
            _, *slices, height, width = source.shape
            strips = [
                source.read(top, bottom, 0, width).flatten(1).double()
                for top, bottom in sample_rows(height, math.prod(slices))
            ]
        except DataError as found:  # the code that uses the image reports it
            error = found
            continue
        for strip in strips:
            require_numbers(strip, f"{images.records[number].path}: ")
        pixels = sum(strip.shape[1] for strip in strips)
        means.append(sum(strip.sum(1) for strip in strips).numpy() / pixels)  # type: ignore[union-attr]
        squares.append(sum((strip**2).sum(1) for strip in strips).numpy() / pixels)  # type: ignore[union-attr]
    if not means:
        raise DataError(f"cannot measure mean and std of the training images: {error or 'there are none'}")
    mean = np.mean(means, 0)
    std = np.sqrt(np.maximum(np.mean(squares, 0) - mean**2, 0))
    if not (std > 0).all():
        raise DataError("cannot measure mean and std of the training images: all their pixels are equal")
    if np.ptp(mean) == 0 and np.ptp(std) == 0:  # grey, in any number of channels
        mean, std = mean[:1], std[:1]
    return Normalize(tuple(round(float(m), 5) for m in mean), tuple(round(float(s), 5) for s in std))


@dataclass(frozen=True)
class _ReadError:
    """Reads an image completely and returns the error message, or an empty string."""

    images: ImageDataset

    def __call__(self, record: Record) -> str:
        try:
            read_through(self.images.opened(record, None), str(record.path))
        except DataError as error:
            return str(error)
        return ""


def unreadable(images: ImageDataset) -> dict[int, str]:
    """The indices of images that cannot be read completely, with the reason; reads in parallel."""
    records: Sequence[Record] = images.records
    found = sorted(run_parallel(_ReadError(images), records, chunk=4), key=lambda pair: pair[0])
    return {number: str(error) for number, error in found if str(error)}
