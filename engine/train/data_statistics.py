"""Checks of the training images before a run: mean and standard deviation, and unreadable files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..datasets.dataset import ImageDataset
from ..datasets.tables import Record
from ..errors import DataError
from ..images.levels import require_numbers, sample_rows
from ..images.parallel import run_parallel
from ..images.pixels import Normalize
from .pixels import read_through

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
            _, height, width = source.shape
            strips = [source.read(top, bottom, 0, width).double() for top, bottom in sample_rows(height)]
        except DataError as found:  # the code that uses the image reports it
            error = found
            continue
        for strip in strips:
            require_numbers(strip, f"{images.records[number].path}: ")
        pixels = sum(strip.shape[1] * strip.shape[2] for strip in strips)
        means.append(sum(strip.sum((1, 2)) for strip in strips).numpy() / pixels)  # type: ignore[union-attr]
        squares.append(sum((strip**2).sum((1, 2)) for strip in strips).numpy() / pixels)  # type: ignore[union-attr]
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


def unreadable(images: ImageDataset, workers: int | None = None) -> dict[int, str]:
    """The indices of images that cannot be read completely, with the reason; reads in parallel."""
    found: dict[int, str] = {}
    records: Sequence[Record] = images.records
    for number, result in run_parallel(_ReadError(images), records, workers=workers, chunk=4):
        if str(result):
            found[number] = str(result)
    return dict(sorted(found.items()))
