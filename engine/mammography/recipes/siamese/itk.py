"""Registration with SimpleITK: mean squares from coarse to fine; affine, optionally after a B-spline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ....errors import DataError, GigamorphError
from ....images.affine import Affine, Coordinates, Map

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


Array = NDArray[np.float64]

_MESH = 4  # cells of the spline's grid along each side; lesions are smaller, so they are not deformed away


def simpleitk() -> Any:
    """Return the module, or None if it is not installed."""
    try:
        import SimpleITK
    except ImportError:
        return None
    return SimpleITK


def affine(fixed: Array, moving: Array) -> Affine:
    """Return the affine map from points of `fixed` to those of `moving` (h, w)."""
    sitk = _required()
    images = _images(sitk, fixed, moving)
    method = _method(sitk)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-5, 500, 0.7, 1e-10)
    method.SetOptimizerScalesFromPhysicalShift()
    centre = sitk.CenteredTransformInitializer(
        *images, sitk.AffineTransform(2), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    method.SetInitialTransform(centre, inPlace=False)
    found = method.Execute(*images)
    x0, y0 = found.TransformPoint((0.0, 0.0))
    (xx, yx), (xy, yy) = (found.TransformPoint(point) for point in ((1.0, 0.0), (0.0, 1.0)))
    return Affine(xx - x0, xy - x0, x0, yx - y0, yy - y0, y0)


def free_form(fixed: Array, moving: Array) -> Map:
    """Return a cubic B-spline deformation followed by `affine`."""
    sitk = _required()
    first = affine(fixed, moving)
    images = _images(sitk, fixed, moving)
    method = _method(sitk)
    method.SetOptimizerAsLBFGSB(gradientConvergenceTolerance=1e-6, numberOfIterations=100)
    method.SetMovingInitialTransform(
        sitk.AffineTransform([first.xx, first.xy, first.yx, first.yy], [first.x0, first.y0])
    )
    spline = sitk.BSplineTransformInitializer(images[0], [_MESH, _MESH])
    method.SetInitialTransform(spline, inPlace=True)
    method.Execute(*images)
    grid = spline.GetCoefficientImages()
    moves = np.stack([sitk.GetArrayFromImage(own) for own in grid])
    return first @ FreeForm(moves, grid[0].GetOrigin(), grid[0].GetSpacing())


def _required() -> Any:
    sitk = simpleitk()
    if sitk is None:
        raise GigamorphError("this registration needs SimpleITK; pip install SimpleITK")
    return sitk


def _images(sitk: Any, *values: Array) -> list[Any]:
    images = [sitk.GetImageFromArray(own) for own in values]
    for image in images:
        image.SetOrigin((0.5, 0.5))  # same coordinates as `Affine`
    return images


def _method(sitk: Any) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([4, 2, 0])
    method.SetNumberOfThreads(1)  # fixed order of sums, for reproducible maps
    return method
