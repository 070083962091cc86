"""A look at the training images before the run: their mean and standard deviation, and files that cannot be read."""

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

LOOKED_AT = 32


def normalize_of(images: ImageDataset, count: int = LOOKED_AT) -> Normalize:
    """Mean and standard deviation of the grey values of images, each of which counts the same; per channel of colour.

    Of at most ``count`` images, spread over the table, a thousand rows at most are read of each: what nnU-Net calls the
    fingerprint of a data set, on all pixels that the network sees.

    Raises:
        DataError: if none of them can be read, or all pixels are equal; of pixels that are no numbers.
    """
    chosen = sorted({round(number) for number in np.linspace(0, len(images) - 1, count)}) if len(images) else []
    means, squares, error = [], [], None
    for number in chosen:
        try:
            source = images.opened(images.records[number], None)
            _, height, width = source.shape
            strips = [source.read(top, bottom, 0, width).double() for top, bottom in sample_rows(height)]
        except DataError as found:  # whoever uses it names it
            error = found
            continue
        for strip in strips:
            require_numbers(strip, f"{images.records[number].path}: ")
        pixels = sum(strip.shape[1] * strip.shape[2] for strip in strips)
        means.append(sum(strip.sum((1, 2)) for strip in strips).numpy() / pixels)  # type: ignore[union-attr]
        squares.append(sum((strip**2).sum((1, 2)) for strip in strips).numpy() / pixels)  # type: ignore[union-attr]
    if not means:
        raise DataError(f"mean and std cannot be taken of the training images: {error or 'there are none'}")
    mean = np.mean(means, 0)
    std = np.sqrt(np.maximum(np.mean(squares, 0) - mean**2, 0))
    if not (std > 0).all():
        raise DataError("mean and std cannot be taken of the training images: all their pixels are equal")
    if np.ptp(mean) == 0 and np.ptp(std) == 0:  # grey, in however many channels
        mean, std = mean[:1], std[:1]
    return Normalize(tuple(round(float(m), 5) for m in mean), tuple(round(float(s), 5) for s in std))


@dataclass(frozen=True)
class _ReadThrough:
    """Reads an image as the network will, and says what is wrong with it; empty if nothing is."""

    images: ImageDataset

    def __call__(self, record: Record) -> str:
        try:
            read_through(self.images.opened(record, None), str(record.path))
        except DataError as error:
            return str(error)
        return ""


def unreadable(images: ImageDataset, workers: int | None = None) -> dict[int, str]:
    """The numbers of images that cannot be read to their end, with the reason; read in parallel."""
    found: dict[int, str] = {}
    records: Sequence[Record] = images.records
    for number, result in run_parallel(_ReadThrough(images), records, workers=workers, chunk=4):
        if str(result):
            found[number] = str(result)
    return dict(sorted(found.items()))
