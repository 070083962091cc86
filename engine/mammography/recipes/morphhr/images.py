"""Images for parent and child: downsampled by r, and at full size, cropped to whole cells of r x r pixels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ....datasets.dataset import ImageDataset
from ....datasets.tables import Record
from ....errors import DataError
from ....images.pixels import PixelSource
from ..sized import PaddedRegion, open_images
from .config import MorphHRConfig


class WholeCells(PaddedRegion):
    """An image without the rows and columns at its lower and right border that do not fill a cell of r x r pixels."""

    def __init__(self, source: PixelSource, r: int) -> None:
        _, height, width = source.shape
        if height < r or width < r:
            raise DataError(f"{source.name}: {height} x {width} pixels are smaller than a cell of {r} x {r}")
        super().__init__(source, 0, 0, height - height % r, width - width % r)
        self.added = (f"cropped to whole cells of {r} x {r} pixels",)


def parent_images(records: Sequence[Record], config: MorphHRConfig, **options: Any) -> ImageDataset:
    """Return the parent's images: the mean of each cell of r x r pixels; options as in `open_images`."""
    return open_images(records, config, downsample=config.factor, **options)


def child_images(records: Sequence[Record], config: MorphHRConfig, **options: Any) -> ImageDataset:
    """Return the child's images: every pixel of the same cells; options as in `open_images`."""
    return open_images(records, config, view=partial(WholeCells, r=config.factor), **options)
