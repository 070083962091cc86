"""Images at the size that a recipe wants: as they are, or resized and cropped as published methods do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..datasets.views import DownsampledSource
from ..errors import GigamorphError
from ..images.pixels import PixelSource


@dataclass(frozen=True)
class Size:
    """What becomes of an image's size; the default leaves it at its native resolution."""

    resize: tuple[int, ...] = ()
    """Empty; the shorter side; or height and width."""
    crop: int = 0
    """Side of the square that is cut from the middle; 0 for none."""

    def __post_init__(self) -> None:
        if len(self.resize) > 2 or any(side < 1 for side in self.resize) or self.crop < 0:
            raise GigamorphError(
                f"resize = {list(self.resize)} must be empty, the shorter side, or height and width, and crop not less "
                "than 0"
            )

    @property
    def native(self) -> bool:
        """Whether images keep their pixels."""
        return not self.resize and not self.crop


def read_sized(source: PixelSource, size: Size) -> Tensor:
    """The whole image at that size: float32 (C, H, W).

    Large images are averaged over whole blocks of pixels first, region by region, and then resized bilinearly with
    anti-aliasing.
    """
    _, height, width = source.shape
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
    else:
        image = source.read(0, height, 0, width)
    if not size.crop:
        return image
    top, left = (image.shape[1] - size.crop) // 2, (image.shape[2] - size.crop) // 2
    if top < 0 or left < 0:
        raise GigamorphError(
            f"{source.name}: {image.shape[1]} x {image.shape[2]} pixels are less than crop = {size.crop}; "
            "make resize larger"
        )
    return image[:, top : top + size.crop, left : left + size.crop]
