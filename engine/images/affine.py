"""Invertible coordinate maps: the origin of each pixel of a transformed image.

Mirroring, cropping and scaling are affine; an elastic deformation (`engine/datasets/augment.py`) is a map too, and a
composition of maps is a map (`ComposedMap`).

Coordinates are continuous, x to the right and y down, in pixels; the pixel in row i and column j covers
[j, j + 1) x [i, i + 1). So a box around whole pixels has integer sides after mirroring, and after averaging by whole
blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from ..errors import DataError

Coordinates = tuple[np.ndarray, np.ndarray]


class CoordinateMap:
    """A continuous, invertible map from the points of one image to those of another."""

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        """The mapped points, float64 (x, y), of arrays that broadcast together.

        The result for a point depends on that point only, to the last bit: there are no sums whose order a library
        chooses by the size of the array.
        """
        raise NotImplementedError

    def inverse(self) -> CoordinateMap:
        """The inverse map."""
        raise NotImplementedError

    def __matmul__(self, first: CoordinateMap) -> CoordinateMap:
        """The composition: `first`, then this map."""
        return ComposedMap((self, first))

    def points(self, xy: Any) -> np.ndarray:
        """The mapped points (x, y), float64 (..., 2), of points (..., 2)."""
        xy = np.asarray(xy, np.float64)
        return np.stack(self.at(xy[..., 0], xy[..., 1]), -1)

    def boxes(self, boxes: Any) -> np.ndarray:
        """The bounding boxes of mapped boxes (..., 4), each (left, top, right, bottom), float64.

        Sides that the map bends are sampled at each pixel.
        """
        boxes = np.asarray(boxes, np.float64)
        found = np.empty_like(boxes)
        for index in np.ndindex(boxes.shape[:-1]):
            left, top, right, bottom = boxes[index]
            xs = np.linspace(left, right, math.ceil(abs(right - left)) + 1)
            ys = np.linspace(top, bottom, math.ceil(abs(bottom - top)) + 1)
            x, y = self.at(
                np.concatenate([xs, xs, np.full_like(ys, left), np.full_like(ys, right)]),
                np.concatenate([np.full_like(xs, top), np.full_like(xs, bottom), ys, ys]),
            )
            found[index] = x.min(), y.min(), x.max(), y.max()
        return found

    def resample(
        self,
        values: Any,
        top: int,
        bottom: int,
        left: int,
        right: int,
        reach: tuple[float, float, float, float] | None = None,
    ) -> np.ndarray:
        """Resample an array of values to a region of the target image, float32 (bottom - top, right - left).

        Bilinear between pixel centres, constant beyond the outer centres, 0 outside of the array. Mirroring and shifts
        by whole pixels preserve values exactly.

        Args:
            values: (h, w), a value per pixel in the source coordinates (for a heat map at stride s, multiply by
                `scale(s)` first).
            top, bottom, left, right: the region.
            reach: (left, top, right, bottom) in the source coordinates, the limit of the outer values; by default the
                borders of the array.
        """
        values = np.asarray(values, np.float32)
        height, width = values.shape
        rows, columns = (axis.astype(np.float64) + 0.5 for axis in np.ogrid[top:bottom, left:right])
        x, y = self.inverse().at(columns, rows)
        x0, y0, x1, y1 = (0, 0, width, height) if reach is None else reach
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        x, y = np.clip(x - 0.5, 0, width - 1), np.clip(y - 0.5, 0, height - 1)
        j, i = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
        part_x, part_y = (x - j).astype(np.float32), (y - i).astype(np.float32)
        next_j, next_i = np.minimum(j + 1, width - 1), np.minimum(i + 1, height - 1)
        upper = values[i, j] * (1 - part_x) + values[i, next_j] * part_x
        lower = values[next_i, j] * (1 - part_x) + values[next_i, next_j] * part_x
        return np.where(inside, upper * (1 - part_y) + lower * part_y, np.float32(0))


@dataclass(frozen=True)
class Affine(CoordinateMap):
    """(x, y) -> (xx x + xy y + x0, yx x + yy y + y0)."""

    xx: float = 1.0
    xy: float = 0.0
    x0: float = 0.0
    yx: float = 0.0
    yy: float = 1.0
    y0: float = 0.0

    @classmethod
    def mirror(cls, height: int, width: int, *, left_right: bool, up_down: bool) -> Affine:
        """The mirroring of an image of height x width pixels; it is its own inverse."""
        return cls(
            xx=-1.0 if left_right else 1.0,
            x0=float(width) if left_right else 0.0,
            yy=-1.0 if up_down else 1.0,
            y0=float(height) if up_down else 0.0,
        )

    @classmethod
    def scale(cls, x: float, y: float | None = None) -> Affine:
        """The scaling of columns by x and rows by y (by default x)."""
        return cls(xx=float(x), yy=float(x if y is None else y))

    @classmethod
    def shift(cls, x: float, y: float) -> Affine:
        """The map from the coordinates of a crop at column x and row y to those of its image."""
        return cls(x0=float(x), y0=float(y))

    @overload
    def __matmul__(self, first: Affine) -> Affine: ...
    @overload
    def __matmul__(self, first: CoordinateMap) -> CoordinateMap: ...
    def __matmul__(self, first: CoordinateMap) -> CoordinateMap:
        """The composition: `first`, then this map."""
        if not isinstance(first, Affine):
            return super().__matmul__(first)
        return Affine(*(self.matrix() @ first.matrix())[:2].ravel().tolist())

    def matrix(self) -> np.ndarray:
        """The float64 matrix (3, 3) for column vectors (x, y, 1)."""
        return np.array([[self.xx, self.xy, self.x0], [self.yx, self.yy, self.y0], [0, 0, 1]], np.float64)

    def inverse(self) -> Affine:
        """The inverse map; `DataError` if the matrix is singular."""
        determinant = self.xx * self.yy - self.xy * self.yx
        if determinant == 0:
            raise DataError(f"{self} cannot be inverted because it maps the image to a line")
        xx, xy, yx, yy = (v / determinant + 0.0 for v in (self.yy, -self.xy, -self.yx, self.xx))
        return Affine(xx, xy, -(xx * self.x0 + xy * self.y0) + 0.0, yx, yy, -(yx * self.x0 + yy * self.y0) + 0.0)

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        return (self.xx * x + self.x0) + self.xy * y, (self.yy * y + self.y0) + self.yx * x

    def boxes(self, boxes: Any) -> np.ndarray:
        """The bounding boxes of mapped boxes (..., 4), each (left, top, right, bottom), float64."""
        boxes = np.asarray(boxes, np.float64)
        corners = self.points(
            np.stack([boxes[..., [0, 1]], boxes[..., [2, 1]], boxes[..., [2, 3]], boxes[..., [0, 3]]])
        )
        return np.concatenate([corners.min(0), corners.max(0)], -1)


@dataclass(frozen=True)
class ComposedMap(CoordinateMap):
    """A composition of maps; the last one is applied first, as in a product of matrices."""

    maps: tuple[CoordinateMap, ...]

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        for own in reversed(self.maps):
            x, y = own.at(x, y)
        return x, y

    def inverse(self) -> ComposedMap:
        return ComposedMap(tuple(own.inverse() for own in reversed(self.maps)))
