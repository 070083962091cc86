"""Tiles of images and masks at every scale, for the viewer."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from ...datasets.masks import Mask, highest, highest_of
from ...images.pixels import PixelSource
from ...report.figure import class_colour, outline_colour

TILE = 512
DIRECT = 2
"""Up to this factor, tiles are read from the image; coarser tiles come from an overview that is computed once."""
OVERVIEW = 4
_ROWS = 256


class Grid:
    """The positions of an image's tiles at every scale: 1, 2, 4, ... pixels to one in both directions."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    @property
    def levels(self) -> int:
        """The number of halvings until the image fits into a tile."""
        return max(0, math.ceil(math.log2(max(self.height, self.width) / TILE)))

    def tiles(self, level: int) -> tuple[int, int]:
        """(columns, rows) of tiles at a level; 0 is the image."""
        side = TILE << level
        return -(-self.width // side), -(-self.height // side)

    def box(self, level: int, column: int, row: int) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of a tile in pixels of the image.

        Raises:
            IndexError: if the tile does not exist.
        """
        columns, rows = self.tiles(level)
        if not (0 <= level <= self.levels and 0 <= column < columns and 0 <= row < rows):
            raise IndexError(f"level {level} has no tile {column}, {row}")
        side = TILE << level
        return row * side, min((row + 1) * side, self.height), column * side, min((column + 1) * side, self.width)


class Pyramid(Grid):
    """Tiles of an image averaged over 1, 2, 4, ... pixels in both directions; one thread at a time.

    Args:
        source: grey values from 0 to 1, with one or three channels.
    """

    def __init__(self, source: PixelSource) -> None:
        super().__init__(*source.shape[1:])
        self._source, self._lock = source, threading.Lock()
        self._overview: NDArray[np.uint8] | None = None

    def tile(self, level: int, column: int, row: int) -> bytes:
        """A tile as PNG, 8 bits per channel.

        Raises:
            IndexError: if the tile does not exist.
            DataError: if the image cannot be read.
        """
        top, bottom, left, right = self.box(level, column, row)
        factor = 1 << level
        with self._lock:
            if factor <= DIRECT:
                pixels = _averaged(self._source.read(top, bottom, left, right).numpy(), factor)
                values = _bytes(pixels)
            else:
                part = self._coarse()[
                    :, top // OVERVIEW : -(-bottom // OVERVIEW), left // OVERVIEW : -(-right // OVERVIEW)
                ]
                values = np.rint(_averaged(part.astype(np.float32), factor // OVERVIEW)).astype(np.uint8)
        return png(values)

    def _coarse(self) -> NDArray[np.uint8]:
        """The overview (channels, height / 4, width / 4), read once, in strips."""
        if self._overview is None:
            found = [
                _bytes(
                    _averaged(self._source.read(top, min(top + _ROWS, self.height), 0, self.width).numpy(), OVERVIEW)
                )
                for top in range(0, self.height, _ROWS)
            ]
            self._overview = np.concatenate(found, 1)
        return self._overview


def png(values: NDArray[np.uint8]) -> bytes:
    """Pixels (channels, height, width) as PNG, with one, three or (with opacity) four channels."""
    image: Any = values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(image), level=4))


def _bytes(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)


def _averaged(pixels: NDArray[Any], factor: int) -> NDArray[Any]:
    """Means over squares of pixels (channels, height, width); squares at the borders may be smaller."""
    if factor == 1:
        return pixels
    for axis in (1, 2):
        starts = np.arange(0, pixels.shape[axis], factor)
        sizes = np.diff(np.append(starts, pixels.shape[axis])).astype(np.float32)
        shape = [1, 1, 1]
        shape[axis] = len(starts)
        pixels = np.add.reduceat(pixels, starts, axis) / sizes.reshape(shape)
    return pixels


_LINE = 2
"""Width of outlines in pixels of a tile, and so the margin that a tile reads."""


class MaskTiles(Grid):
    """Tiles of a mask in the colours of its classes, with a transparent background; one thread at a time.

    Downsampling keeps the highest class, so that small areas are visible at every scale.

    Args:
        mask: the mask.
        outlined: show the outlines of classes instead of their areas.
    """

    def __init__(self, mask: Mask, *, outlined: bool) -> None:
        super().__init__(*mask.shape)
        self._mask, self._outlined, self._lock = mask, outlined, threading.Lock()
        self._overview: NDArray[np.uint8] | None = None

    def tile(self, level: int, column: int, row: int) -> bytes:
        """A tile as PNG of red, green, blue and opacity.

        Raises:
            IndexError: if the tile does not exist.
            DataError: if the mask cannot be read, or has a value without a class.
        """
        top, bottom, left, right = self.box(level, column, row)
        factor = 1 << level
        beyond = _LINE * factor
        above, before = min(beyond, top), min(beyond, left)
        with self._lock:
            values = self._highest(top - above, bottom + beyond, left - before, right + beyond, factor)
        if self._outlined:
            values = _outlines(values)
        rows, columns = -(-(bottom - top) // factor), -(-(right - left) // factor)
        y, x = above // factor, before // factor
        colours = outline_colour if self._outlined else class_colour
        return png(_coloured(values[y : y + rows, x : x + columns], colours))

    def _highest(self, top: int, bottom: int, left: int, right: int, factor: int) -> NDArray[np.uint8]:
        bottom, right = min(bottom, self.height), min(right, self.width)
        if factor <= DIRECT:
            return highest_of(self._mask.read(top, bottom, left, right), factor)
        if self._overview is None:
            self._overview = highest(self._mask, OVERVIEW)
        part = self._overview[top // OVERVIEW : -(-bottom // OVERVIEW), left // OVERVIEW : -(-right // OVERVIEW)]
        return highest_of(part, factor // OVERVIEW)


def _outlines(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The classes at their borders, 0 in the interior."""
    found = np.zeros_like(values)
    for number in np.unique(values[values > 0]):
        area = values == number
        found[area & ~binary_erosion(area, iterations=_LINE, border_value=1)] = number
    return found


def _coloured(values: NDArray[np.uint8], colour_of: Callable[[int], str]) -> NDArray[np.uint8]:
    """Colours (4, rows, columns) of classes (rows, columns)."""
    colours = np.zeros((256, 4), np.uint8)
    for number in range(1, 256):
        colours[number] = [*bytes.fromhex(colour_of(number)[1:]), 255]
    return np.ascontiguousarray(colours[values].transpose(2, 0, 1))
