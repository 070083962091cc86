"""An image resampled by a coordinate map, read by region: each pixel is interpolated at the mapped point.

    out(i, j) = bilinear(source, back(j + 1/2, i + 1/2)), black beyond the source

The mapped point of a pixel is computed from its row and column in the whole image, so a region has the same bits
whether it is read alone or as part of a larger one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..images.affine import CoordinateMap
from ..images.parallel import available_cpus
from ..images.pixels import DerivedSource, PixelSource, check_region

# Side of the part that is read from the source at once, so that a file tile is decoded once; side of the block that one
# thread samples within its cache.
_PART, _BLOCK = 1024, 256

_Region = tuple[int, int, int, int]  # top, bottom, left, right; ends excluded
_Cells = list[tuple[np.ndarray, np.ndarray]]


class SampledSource(DerivedSource):
    """An image of the same size as its source.

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
        out = np.empty((self.shape[0], bottom - top, right - left), np.float32)
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
        return torch.from_numpy(out)

    def _cells(self, region: _Region) -> _Cells:
        """For each axis (rows, columns): the first of the two source pixels around each point, and the second's weight.

        Indices are clipped to two pixels beyond each border, where both pixels of a pair are black.
        """
        rows, columns = (
            axis.astype(np.float64) + 0.5 for axis in np.ogrid[region[0] : region[1], region[2] : region[3]]
        )
        found = []
        for position, size in zip(reversed(self.back.at(columns, rows)), self.shape[1:], strict=True):
            position = position - 0.5
            first = np.floor(position)
            weight = (position - first).astype(np.float32)
            found.append((np.clip(first, -2, size).astype(np.int32), weight))
        return found

    def _patch(self, top: int, bottom: int, left: int, right: int) -> tuple[np.ndarray, tuple[int, int]]:
        """A region of the source, 0 outside of it, and the (row, column) of its first pixel."""
        channels, height, width = self.shape
        out = np.zeros((channels, bottom - top, right - left), np.float32)
        rows, columns = (max(top, 0), min(bottom, height)), (max(left, 0), min(right, width))
        if rows[0] < rows[1] and columns[0] < columns[1]:
            part = self.source.read(*rows, *columns).cpu().numpy()
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
