"""Pixel sources that wrap pixel sources: mirrored, area-averaged and normalised images, read by region."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, cat
from torch.nn.functional import avg_pool2d

from ..errors import DataError, GigamorphError
from ..images.affine import Affine
from ..images.pixels import DerivedSource, Normalize, PixelSource, check_region
from .flips import FLIPS


def mirrorings(names: Iterable[str]) -> tuple[tuple[bool, bool], ...]:
    """(left-right, up-down) of the unchanged image and of the mirror images with these names of `FLIPS`.

    Raises:
        GigamorphError: if a name is unknown.
    """
    names = dict.fromkeys(names)
    unknown = next((name for name in names if name not in FLIPS), None)
    if unknown is not None:
        raise GigamorphError(f"unknown flip {unknown!r}; choose from {', '.join(FLIPS)}")
    return ((False, False), *(FLIPS[name] for name in names))


# The maximum number of input values per averaging step: 16 MiB of float32.
_STEP = 2**22


class MirroredSource(DerivedSource):
    """An image mirrored left-right, up-down or both: it reads the mirrored region and flips it."""

    def __init__(self, source: PixelSource, *, left_right: bool, up_down: bool) -> None:
        super().__init__(source)
        self.left_right, self.up_down = left_right, up_down
        self.back = Affine.mirror(*self.shape[1:], left_right=left_right, up_down=up_down)
        sides = [side for side, is_so in (("left-right", left_right), ("up-down", up_down)) if is_so]
        self.added = (f"mirrored {' and '.join(sides)}",) if sides else ()

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        _, height, width = self.shape
        rows = (height - bottom, height - top) if self.up_down else (top, bottom)
        columns = (width - right, width - left) if self.left_right else (left, right)
        axes = [axis for axis, mirrored in ((1, self.up_down), (2, self.left_right)) if mirrored]
        return self.source.read(*rows, *columns).flip(axes)


class DownsampledSource(DerivedSource):
    """An image at 1/factor of its resolution: each pixel is the mean of factor x factor pixels.

    Rows and columns at the lower and right border that do not fill a block are dropped.
    """

    def __init__(self, source: PixelSource, factor: int) -> None:
        _, height, width = source.shape
        if factor < 1 or height < factor or width < factor:
            raise DataError(f"{source.name}: {height} x {width} pixels cannot be averaged over {factor} x {factor}")
        super().__init__(source, height // factor, width // factor)
        self.factor, self.back = factor, Affine.scale(factor)
        self.added = (f"averaged over {factor} x {factor} pixels",)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        factor = self.factor
        per_row = self.shape[0] * max(right - left, 1) * factor**2
        step = max(1, _STEP // per_row)
        strips = []
        for first in range(top, max(bottom, top + 1), step):
            last = min(first + step, bottom)
            pixels = self.source.read(first * factor, last * factor, left * factor, right * factor)
            strips.append(avg_pool2d(pixels, factor) if pixels.numel() else pixels[:, : last - first, : right - left])
        return cat(strips, 1)


class NormalizedSource(DerivedSource):
    """An image of grey values that is normalised after other steps, such as augmentation."""

    def __init__(self, source: PixelSource, normalize: Normalize) -> None:
        super().__init__(source)
        self.normalize, self.added = normalize, normalize.steps
        self._mean, self._std = normalize.per_channel(source.shape[0])

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        values = self.source.read(top, bottom, left, right)
        for channel, (mean, std) in enumerate(zip(self._mean, self._std, strict=True)):
            if (mean, std) != (0.0, 1.0):
                values[channel].sub_(mean).div_(std)
        return values
