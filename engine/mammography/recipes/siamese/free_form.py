"""Free-form deformation by a uniform cubic B-spline (Rueckert et al., IEEE TMI 18, 1999)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ....errors import DataError
from ....images.affine import Coordinates, Map

_CLOSE, _STEPS = 1e-6, 200  # tolerance in pixels, and maximal iterations of the inverse


@dataclass(frozen=True, eq=False)
class FreeForm(Map):
    """p -> p + sum over grid points g of moves[g] B((p - origin) / spacing - g); B is the cubic B-spline.

    moves: (2, rows, columns), displacements of the grid points in x and y, in pixels; constant beyond the grid.
    origin, spacing: of the grid, (x, y) in pixels.
    """

    moves: NDArray[np.float64]
    origin: tuple[float, float]
    spacing: tuple[float, float]

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        move_x, move_y = self.displacement(x, y)
        return x + move_x, y + move_y

    def displacement(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        """Return float64 (x, y) displacements at points."""
        column, row = ((p - o) / s for p, o, s in zip((x, y), self.origin, self.spacing, strict=True))
        position = np.stack(np.broadcast_arrays(row, column))
        found = [ndimage.map_coordinates(m, position, order=3, mode="nearest", prefilter=False) for m in self.moves]
        return found[0], found[1]

    def inverse(self) -> Map:
        return _InverseFreeForm(self)


@dataclass(frozen=True, eq=False)
class _InverseFreeForm(Map):
    """The inverse deformation, by fixed-point iteration."""

    forth: FreeForm

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        back_x, back_y = (axis.astype(np.float64) for axis in np.broadcast_arrays(x, y))
        for _ in range(_STEPS):
            move_x, move_y = self.forth.displacement(back_x, back_y)
            far = max(np.abs(x - move_x - back_x).max(initial=0), np.abs(y - move_y - back_y).max(initial=0))
            back_x, back_y = x - move_x, y - move_y
            if far < _CLOSE:
                return back_x, back_y
        raise DataError("the free-form deformation folds, so it has no inverse; use an affine registration")

    def inverse(self) -> FreeForm:
        return self.forth
