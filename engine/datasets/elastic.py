"""Elastic deformation: a smooth random displacement of each point, computed for the requested points only.

    (x, y) -> (x, y) + sum over grid points g of p(g) B((x, y) / spacing - g)

B is the uniform cubic B-spline in both directions, p(g) a random vector of the grid point g within +-size: the
free-form deformation of Rueckert et al. (IEEE TMI 18, 1999). The weights of the 16 grid points around a point are
positive and sum to one, so no component of a displacement exceeds `size`. Along an axis it changes by at most
2 size / spacing per pixel, so with spacing > 4 size the map is injective, and its inverse is found by iteration.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..images.affine import CoordinateMap, Coordinates
from .counter_random import uniform

_Four = tuple[np.ndarray, ...]
_CLOSE = 1e-6  # pixels: the accuracy of the inverse
_ORIGIN = 2**30  # makes counters of negative grid points positive


@dataclass(frozen=True)
class Elastic(CoordinateMap):
    """A deformation of points; sizes are in pixels.

    Args:
        keys: the keys of the random displacements in x and in y.
        size: the largest displacement in each direction.
        spacing: the distance of the grid points, at least 5 times `size`.
    """

    keys: tuple[np.uint64, np.uint64]
    size: float
    spacing: float

    LEAST: ClassVar[float] = 5.0
    """The smallest ratio of spacing to size; neighbouring points then approach by at most 4/5 of their distance."""

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        move_x, move_y = self.displacement(x, y)
        return x + move_x, y + move_y

    def displacement(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        """The float64 (x, y) displacements at points; fastest for a region: an ascending row of x and column of y."""
        j, weights_x = _weights(x, self.spacing)
        i, weights_y = _weights(y, self.spacing)
        if x.ndim == y.ndim == 2 and len(x) == 1 and y.shape[1] == 1:
            move_x, move_y = (self._region(key, i[:, 0], j[0], weights_y, weights_x) for key in self.keys)
        else:
            move_x, move_y = (self._scattered(key, i, j, weights_y, weights_x) for key in self.keys)
        return move_x, move_y

    def inverse(self) -> CoordinateMap:
        return _Inverse(self)

    def _region(self, key: np.uint64, i: np.ndarray, j: np.ndarray, weights_y: _Four, weights_x: _Four) -> np.ndarray:
        """The spline at the pixels of a region, first along the rows of the grid, then along its columns."""
        rows, columns = (np.arange(int(n[0]), int(n[-1]) + 4) for n in (i, j))
        grid = self._grid(key, rows[:, None], columns)
        along = _sum([grid[:, j - columns[0] + k] * weights_x[k] for k in range(4)])
        out = np.empty((len(i), len(j)))
        for first in range(int(i[0]), int(i[-1]) + 1):
            own = slice(*np.searchsorted(i, [first, first + 1]))
            out[own] = _sum([weights_y[k][own] * along[first - rows[0] + k] for k in range(4)])
        return out

    def _scattered(
        self, key: np.uint64, i: np.ndarray, j: np.ndarray, weights_y: _Four, weights_x: _Four
    ) -> np.ndarray:
        return _sum(
            [weights_y[k] * _sum([self._grid(key, i + k, j + n) * weights_x[n] for n in range(4)]) for k in range(4)]
        )

    def _grid(self, key: np.uint64, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """A component of the random vectors of grid points, float64."""
        return (uniform(key, (row + _ORIGIN << 32 | column + _ORIGIN).astype(np.uint64)) * 2 - 1) * self.size


@dataclass(frozen=True)
class _Inverse(CoordinateMap):
    """The inverse of a deformation."""

    forward: Elastic

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        back_x, back_y = np.broadcast_arrays(x, y)
        # Each step reduces the error at least by the factor 4 size / spacing.
        distance, factor = self.forward.size, 4 * self.forward.size / self.forward.spacing
        while distance > _CLOSE:
            move_x, move_y = self.forward.displacement(back_x, back_y)
            back_x, back_y = x - move_x, y - move_y
            distance *= factor
        return back_x, back_y

    def inverse(self) -> Elastic:
        return self.forward


def _weights(positions: np.ndarray, spacing: float) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The first of the four grid points around each position, and the four values of the cubic B-spline."""
    first = np.floor(positions / spacing)
    t = positions / spacing - first
    s = 1 - t
    square = t * t
    return first.astype(np.int64) - 1, (
        s * s * s / 6,
        (square * t * 3 - square * 6 + 4) / 6,
        (square * t * -3 + square * 3 + t * 3 + 1) / 6,
        square * t / 6,
    )


def _sum(four: list[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, four)
