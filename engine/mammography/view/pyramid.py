"""Tiles of images and masks at every scale, for the viewer."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
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


class PyramidTiles(ABC):
    """Tiles at every scale, 1, 2, 4, ... pixels to one in both directions; one thread at a time."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width, self._lock = height, width, threading.Lock()

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

    def tile(self, level: int, column: int, row: int) -> bytes:
        """A tile as PNG, 8 bits per channel.

        Raises:
            IndexError: if the tile does not exist.
            DataError: if the image or the mask cannot be read, or the mask has a value without a class.
        """
        box = self.box(level, column, row)
        with self._lock:
            values = self._values(*box, 1 << level)
        return png(values)

    @cached_property
    @abstractmethod
    def _overview(self) -> NDArray[np.uint8]:
        """Values (..., height / 4, width / 4), computed once."""

    @abstractmethod
    def _values(self, top: int, bottom: int, left: int, right: int, factor: int) -> NDArray[np.uint8]:
        """Values (channels, rows, columns) of a region of the image, reduced by a factor."""

    def _coarse(self, top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
        """The part of the overview that covers a region of the image."""
        return self._overview[..., top // OVERVIEW : -(-bottom // OVERVIEW), left // OVERVIEW : -(-right // OVERVIEW)]


class Pyramid(PyramidTiles):
    """Tiles of an image averaged over 1, 2, 4, ... pixels in both directions.

    Args:
        source: grey values from 0 to 1, with one or three channels.
    """

    def __init__(self, source: PixelSource) -> None:
        super().__init__(*source.shape[1:])
        self._source = source

    def _values(self, top: int, bottom: int, left: int, right: int, factor: int) -> NDArray[np.uint8]:
        if factor <= DIRECT:
            return _bytes(_averaged(self._source.read(top, bottom, left, right).numpy(), factor))
        part = self._coarse(top, bottom, left, right).astype(np.float32)
        return np.rint(_averaged(part, factor // OVERVIEW)).astype(np.uint8)

    @cached_property
    def _overview(self) -> NDArray[np.uint8]:
        """Values (channels, height / 4, width / 4), read in strips."""
        bounds = [(top, min(top + _ROWS, self.height)) for top in range(0, self.height, _ROWS)]
        strips = (self._source.read(top, bottom, 0, self.width).numpy() for top, bottom in bounds)
        return np.concatenate([_bytes(_averaged(strip, OVERVIEW)) for strip in strips], 1)


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


class MaskTiles(PyramidTiles):
    """Tiles of a mask in the colours of its classes, with a transparent background.

    Downsampling keeps the highest class, so that small areas are visible at every scale.

    Args:
        mask: the mask.
        outlined: show the outlines of classes instead of their areas.
    """

    def __init__(self, mask: Mask, *, outlined: bool) -> None:
        super().__init__(*mask.shape)
        self._mask, self._outlined = mask, outlined

    def _values(self, top: int, bottom: int, left: int, right: int, factor: int) -> NDArray[np.uint8]:
        """Red, green, blue and opacity."""
        beyond = _LINE * factor
        above, before = min(beyond, top), min(beyond, left)
        values = self._highest(top - above, bottom + beyond, left - before, right + beyond, factor)
        if self._outlined:
            values = _outlines(values)
        rows, columns = -(-(bottom - top) // factor), -(-(right - left) // factor)
        y, x = above // factor, before // factor
        colours = outline_colour if self._outlined else class_colour
        return _coloured(values[y : y + rows, x : x + columns], colours)

    def _highest(self, top: int, bottom: int, left: int, right: int, factor: int) -> NDArray[np.uint8]:
        bottom, right = min(bottom, self.height), min(right, self.width)
        if factor <= DIRECT:
            return highest_of(self._mask.read(top, bottom, left, right), factor)
        return highest_of(self._coarse(top, bottom, left, right), factor // OVERVIEW)

    @cached_property
    def _overview(self) -> NDArray[np.uint8]:
        return highest(self._mask, OVERVIEW)


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
