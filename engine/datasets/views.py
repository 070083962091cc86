"""Pixel sources that wrap pixel sources: mirrored, averaged, resampled and normalised images, read by region."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
from torch import Tensor, cat, from_numpy
from torch.nn.functional import avg_pool2d

from ..errors import DataError, GigamorphError
from ..images.affine import Affine, CoordinateMap
from ..images.parallel import available_cpus
from ..images.pixels import DerivedSource, Normalize, PixelSource, as_stored, check_region
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
        self.back = Affine.mirror(*self.shape[-2:], left_right=left_right, up_down=up_down)
        sides = [side for side, is_so in (("left-right", left_right), ("up-down", up_down)) if is_so]
        self.added = (f"mirrored {' and '.join(sides)}",) if sides else ()

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        height, width = self.shape[-2:]
        rows = (height - bottom, height - top) if self.up_down else (top, bottom)
        columns = (width - right, width - left) if self.left_right else (left, right)
        axes = [axis for axis, mirrored in ((-2, self.up_down), (-1, self.left_right)) if mirrored]
        return self.source.read(*rows, *columns).flip(axes)


class SliceSource(DerivedSource):
    """A slice of a volume as an image (channels, height, width)."""

    def __init__(self, volume: PixelSource, number: int) -> None:
        super().__init__(volume)
        channels, slices, height, width = volume.shape
        self.number, self.shape = number, (channels, height, width)
        self.added = (f"slice {number} of {slices}",)

    @property
    def as_stored(self) -> PixelSource:
        return SliceSource(as_stored(self.source), self.number)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self.source.read(top, bottom, left, right)[:, self.number]


class DownsampledSource(DerivedSource):
    """An image at 1/factor of its resolution: each pixel is the mean of factor x factor pixels.

    Rows and columns at the lower and right border that do not fill a block are dropped.
    """

    def __init__(self, source: PixelSource, factor: int) -> None:
        height, width = source.shape[-2:]
        if factor < 1 or height < factor or width < factor:
            raise DataError(f"{source.name}: {height} x {width} pixels cannot be averaged over {factor} x {factor}")
        super().__init__(source, height // factor, width // factor)
        self.factor, self.back = factor, Affine.scale(factor)
        self.added = (f"averaged over {factor} x {factor} pixels",)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        factor = self.factor
        per_row = math.prod(self.shape[:-2]) * max(right - left, 1) * factor**2
        step = max(1, _STEP // per_row)
        strips = []
        for first in range(top, max(bottom, top + 1), step):
            last = min(first + step, bottom)
            pixels = self.source.read(first * factor, last * factor, left * factor, right * factor)
            strips.append(avg_pool2d(pixels, factor) if pixels.numel() else pixels[..., : last - first, : right - left])
        return cat(strips, -2)


# Side of the part that is read from the source at once, so that a file tile is decoded once; side of the block that one
# thread samples within its cache.
_PART, _BLOCK = 1024, 256

_Region = tuple[int, int, int, int]  # top, bottom, left, right; ends excluded
_Cells = list[tuple[np.ndarray, np.ndarray]]


class SampledSource(DerivedSource):
    """An image of the same size as its source, resampled by a coordinate map: each pixel is interpolated.

        out(i, j) = bilinear(source, back(j + 1/2, i + 1/2)), black beyond the source

    The mapped point of a pixel is computed from its row and column in the whole image, so a region has the same bits
    whether it is read alone or as part of a larger one.

    Args:
        back: from this image's coordinates to those of the source.
        what: the name of the step, for display and records.
    """

    back: CoordinateMap

    def __init__(self, source: PixelSource, back: CoordinateMap, what: str) -> None:
        super().__init__(source)
        self.back, self.added = back, (what,)

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        out = np.empty((math.prod(self.shape[:-2]), bottom - top, right - left), np.float32)
        with ThreadPoolExecutor(min(8, available_cpus()), "gigamorph-sampling") as pool:
            for part in _cut((top, bottom, left, right), _PART):
                blocks = _cut(part, _BLOCK)
                each = pool.map if len(blocks) > 1 else map
                cells = list(each(self._cells, blocks))
                rows, columns = ([cell[axis][0] for cell in cells] for axis in (0, 1))
                pixels, first = self._patch(
                    min(int(i.min()) for i in rows),
                    max(int(i.max()) for i in rows) + 2,
                    min(int(j.min()) for j in columns),
                    max(int(j.max()) for j in columns) + 2,
                )
                goals = [out[:, y - top : bottom_ - top, x - left : right_ - left] for y, bottom_, x, right_ in blocks]
                list(each(lambda cell, goal: _sample(pixels, first, cell, goal), cells, goals))  # noqa: B023
        return from_numpy(out.reshape(*self.shape[:-2], bottom - top, right - left))

    def _cells(self, region: _Region) -> _Cells:
        """For each axis (rows, columns): the first of the two source pixels around each point, and the second's weight.

        Indices are clipped to two pixels beyond each border, where both pixels of a pair are black.
        """
        rows, columns = (
            axis.astype(np.float64) + 0.5 for axis in np.ogrid[region[0] : region[1], region[2] : region[3]]
        )
        found = []
        for position, size in zip(reversed(self.back.at(columns, rows)), self.shape[-2:], strict=True):
            position = position - 0.5
            first = np.floor(position)
            weight = (position - first).astype(np.float32)
            found.append((np.clip(first, -2, size).astype(np.int32), weight))
        return found

    def _patch(self, top: int, bottom: int, left: int, right: int) -> tuple[np.ndarray, tuple[int, int]]:
        """A region of the source, 0 outside of it, and the (row, column) of its first pixel; slices are channels."""
        *outer, height, width = self.shape
        out = np.zeros((math.prod(outer), bottom - top, right - left), np.float32)
        rows, columns = (max(top, 0), min(bottom, height)), (max(left, 0), min(right, width))
        if rows[0] < rows[1] and columns[0] < columns[1]:
            part = (
                self.source.read(*rows, *columns).cpu().numpy().reshape(-1, rows[1] - rows[0], columns[1] - columns[0])
            )
            out[:, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left] = part
        return out, (top, left)


def _cut(region: _Region, side: int) -> list[_Region]:
    top, bottom, left, right = region
    corners = product(range(top, bottom, side), range(left, right, side))
    return [(y, min(y + side, bottom), x, min(x + side, right)) for y, x in corners]


def _sample(pixels: np.ndarray, first: tuple[int, int], cells: _Cells, out: np.ndarray) -> None:
    """Interpolate bilinearly from pixels (channels, rows, columns) that start at `first` of the source into `out`."""
    (i, low), (j, right) = cells
    stride = pixels.shape[2]
    above = (i - first[0]) * np.intp(stride) + (j - first[1])
    below = above + stride
    high, left = 1 - low, 1 - right
    for plane, goal in zip(pixels.reshape(len(pixels), -1), out, strict=True):
        upper = plane[above] * left + plane[above + 1] * right
        lower = plane[below] * left + plane[below + 1] * right
        goal[...] = upper * high + lower * low


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
