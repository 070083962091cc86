"""Tiles of masks at every scale: predictions as coloured areas, references as outlines."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from ...datasets.masks import Mask, highest, highest_of
from ...report.figure import class_colour, outline_colour
from .pyramid import DIRECT, OVERVIEW, Grid, png

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
