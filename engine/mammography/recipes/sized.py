"""Images at a recipe's size: native, or resized and cropped as in published methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...datasets.dataset import ImageDataset
from ...datasets.views import DownsampledSource
from ...errors import GigamorphError
from ...images.affine import Affine
from ...images.pixels import DerivedSource, PixelSource, check_region


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


class SizedSource(DerivedSource):
    """An image at a recipe's size, which is small: it is read whole and stored."""

    def __init__(self, source: PixelSource, size: Size) -> None:
        self._image, self.back = _resize(source, size)
        super().__init__(source, *self._image.shape[1:])
        self.added = (f"resized and cropped to {self.shape[1]} x {self.shape[2]} pixels",)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        return self._image[:, top:bottom, left:right].clone()


class SizedImages(ImageDataset):
    """Images at a recipe's size."""

    size = Size()

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return item if self.size.native else {**item, "image": SizedSource(item["image"], self.size)}


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
