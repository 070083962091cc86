"""Images of recipes: native, or resized and cropped as in published methods; regions of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...datasets.augment import Augment
from ...datasets.dataset import ImageDataset
from ...datasets.tables import Record
from ...datasets.views import DownsampledSource
from ...errors import GigamorphError
from ...images.affine import Affine
from ...images.pixels import DerivedSource, Normalize, PixelSource, check_region
from .splits import ImagesConfig


@dataclass(frozen=True)
class Size:
    """How images are resized; the default keeps the native resolution."""

    resize: tuple[int, ...] = ()
    """Empty; the shorter side; or height and width."""
    crop: int = 0
    """Side of the central square to crop; 0 for none."""

    def __post_init__(self) -> None:
        if len(self.resize) > 2 or any(side < 1 for side in self.resize) or self.crop < 0:
            raise GigamorphError(
                f"resize = {list(self.resize)} must be empty, the shorter side, or height and width, and crop at least "
                "0"
            )

    @property
    def native(self) -> bool:
        """Whether images keep their native pixels."""
        return not self.resize and not self.crop

    @property
    def view(self) -> Callable[[PixelSource], PixelSource] | None:
        """The function that gives an image this size; None if it keeps its own."""
        return None if self.native else partial(SizedSource, size=self)


class SizedSource(DerivedSource):
    """An image at a recipe's size, which is small: it is read whole and stored."""

    def __init__(self, source: PixelSource, size: Size) -> None:
        self._image, self.back = _resize(source, size)
        super().__init__(source, *self._image.shape[1:])
        self.added = (f"resized and cropped to {self.shape[1]} x {self.shape[2]} pixels",)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        return self._image[:, top:bottom, left:right].clone()


class PaddedRegion(DerivedSource):
    """A region of an image, black beyond its borders; a square unless its width is given."""

    def __init__(self, source: PixelSource, top: int, left: int, height: int, width: int | None = None) -> None:
        super().__init__(source, height, height if width is None else width)
        self.top, self.left = top, left
        self.back = Affine.shift(left, top) if top or left else None

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        channels, height, width = self.source.shape
        y, y_end, x, x_end = self.top + top, self.top + bottom, self.left + left, self.left + right
        inside = max(y, 0), min(y_end, height), max(x, 0), min(x_end, width)
        if inside[0] >= inside[1] or inside[2] >= inside[3]:
            return torch.zeros(channels, bottom - top, right - left)
        return F.pad(self.source.read(*inside), (inside[2] - x, x_end - inside[3], inside[0] - y, y_end - inside[1]))


def open_images(
    records: Sequence[Record],
    config: ImagesConfig,
    *,
    augment: str | None = None,
    **options: Any,
) -> ImageDataset:
    """Return the images of a recipe, with the normalisation, grey scale and channels of its configuration.

    Args:
        augment: text of an `Augment`; empty or None for none.
        options: others of `ImageDataset`, such as the `view` of a `Size`.
    """
    varied = Augment.parse(augment) if augment else None
    scale = Normalize(config.mean, config.std)
    return ImageDataset(records, normalize=scale, voi=config.voi, channels=config.channels, augment=varied, **options)


def read_sized(source: PixelSource, size: Size) -> Tensor:
    """Read the whole image at that size: float32 (C, H, W).

    Large images are first averaged over blocks of pixels, region by region, and then resized bilinearly with
    anti-aliasing.
    """
    return _resize(source, size)[0]


def _resize(source: PixelSource, size: Size) -> tuple[Tensor, Affine]:
    """Return the image at that size, and the map from its coordinates to those of the source."""
    _, height, width = source.shape
    to_source = Affine()
    if size.resize:
        wanted = size.resize
        if len(wanted) == 1:
            shorter = min(height, width)
            wanted = tuple(max(1, round(side * wanted[0] / shorter)) for side in (height, width))
        factor = max(1, min(height // wanted[0], width // wanted[1]))
        if factor > 1:
            source = DownsampledSource(source, factor)
        _, height, width = source.shape
        image = source.read(0, height, 0, width)[None]
        image = F.interpolate(image, wanted, mode="bilinear", antialias=True, align_corners=False)[0]
        to_source = Affine.scale(factor * width / wanted[1], factor * height / wanted[0])
    else:
        image = source.read(0, height, 0, width)
    if not size.crop:
        return image, to_source
    top, left = (image.shape[1] - size.crop) // 2, (image.shape[2] - size.crop) // 2
    if top < 0 or left < 0:
        raise GigamorphError(
            f"{source.name}: {image.shape[1]} x {image.shape[2]} pixels are smaller than crop = {size.crop}; "
            "increase resize"
        )
    return image[:, top : top + size.crop, left : left + size.crop], to_source @ Affine.shift(left, top)
