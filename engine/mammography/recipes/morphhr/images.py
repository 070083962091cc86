"""Images for parent and child: downsampled by r, and at full size, cropped to whole cells of r x r pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ....datasets.augment import Augment
from ....datasets.dataset import ImageDataset
from ....datasets.tables import Record
from ....errors import DataError
from ....images.pixels import DerivedSource, Normalize, PixelSource, check_region
from .config import Config


class WholeCells(DerivedSource):
    """An image without the rows and columns at its lower and right border that do not fill a cell of r x r pixels."""

    def __init__(self, source: PixelSource, r: int) -> None:
        _, height, width = source.shape
        if height < r or width < r:
            raise DataError(f"{source.name}: {height} x {width} pixels are smaller than a cell of {r} x {r}")
        super().__init__(source, height - height % r, width - width % r)
        self.added = (f"cropped to whole cells of {r} x {r} pixels",)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        return self.source.read(top, bottom, left, right)


class ChildImages(ImageDataset):
    """Images at full size, cropped to whole cells of r x r pixels."""

    r = 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "image": WholeCells(item["image"], self.r)}


def parent_images(records: Sequence[Record], config: Config, *, augment: bool = False, seed: int = 0) -> ImageDataset:
    """Return the parent's images: the mean of each cell of r x r pixels."""
    return ImageDataset(records, downsample=config.factor, **_options(config, augment, seed))


def child_images(records: Sequence[Record], config: Config, *, augment: bool = False, seed: int = 0) -> ImageDataset:
    """Return the child's images: every pixel of the same cells."""
    images = ChildImages(records, **_options(config, augment, seed))
    images.r = config.factor
    return images


def _options(config: Config, augment: bool, seed: int) -> dict[str, Any]:
    return {
        "normalize": Normalize(config.mean, config.std),
        "voi": config.voi,
        "channels": config.channels,
        "augment": Augment.parse(config.augment) if augment and config.augment else None,
        "seed": seed,
    }
