"""Registration: the map between both breasts, computed on small copies.

With SimpleITK see `itk_affine` and `itk_free_form`. Without it the map is affine: phase correlation of the breasts'
masks gives the shift, then Gauss-Newton steps reduce the mean square difference of the smoothed images (Lucas and
Kanade, 1981, with the gradient of the warped moving image times the coordinates).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ....datasets.views import DownsampledSource, SampledSource
from ....errors import DataError, GigamorphError
from ....images.affine import Affine, CoordinateMap, Coordinates
from ....images.pixels import PixelSource
from ..sized import PaddedRegion

_CLOSE, _INVERSE_STEPS = 1e-6, 200  # tolerance in pixels, and maximal iterations of the inverse


@dataclass(frozen=True, eq=False)
class FreeForm(CoordinateMap):
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

    def inverse(self) -> CoordinateMap:
        return _InverseFreeForm(self)


@dataclass(frozen=True, eq=False)
class _InverseFreeForm(CoordinateMap):
    """The inverse deformation, by fixed-point iteration."""

    forth: FreeForm

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        back_x, back_y = (axis.astype(np.float64) for axis in np.broadcast_arrays(x, y))
        for _ in range(_INVERSE_STEPS):
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


def itk_affine(fixed: Array, moving: Array) -> Affine:
    """Return the affine map from points of `fixed` to those of `moving` (h, w)."""
    sitk = _require_simpleitk()
    images = _itk_images(sitk, fixed, moving)
    method = _itk_method(sitk)
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


def itk_free_form(fixed: Array, moving: Array) -> CoordinateMap:
    """Return a cubic B-spline deformation followed by `itk_affine`."""
    sitk = _require_simpleitk()
    first = itk_affine(fixed, moving)
    images = _itk_images(sitk, fixed, moving)
    method = _itk_method(sitk)
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


def _require_simpleitk() -> Any:
    sitk = simpleitk()
    if sitk is None:
        raise GigamorphError("this registration needs SimpleITK; pip install SimpleITK")
    return sitk


def _itk_images(sitk: Any, *values: Array) -> list[Any]:
    images = [sitk.GetImageFromArray(own) for own in values]
    for image in images:
        image.SetOrigin((0.5, 0.5))  # same coordinates as `Affine`
    return images


def _itk_method(sitk: Any) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([4, 2, 0])
    method.SetNumberOfThreads(1)  # fixed order of sums, for reproducible maps
    return method


Method = Literal["auto", "simpleitk", "bspline", "gauss_newton", "none"]

_SIDE = 192  # pixels of the longer side of the small copies
_AIR = 0.05  # of the largest grey value; darker pixels are air
_SMOOTH = (8.0, 4.0, 2.0)  # pixels of the small copies
_STEPS = 40


def breast_mask(image: NDArray[Any]) -> NDArray[np.bool_]:
    """Return the mask of tissue: the largest connected part of (h, w) above 5 % of the grey range."""
    low, high = float(image.min()), float(image.max())
    parts: Any = ndimage.label(image > low + _AIR * (high - low))
    labels, count = parts
    if not count:
        return np.zeros(image.shape, bool)
    sizes = np.bincount(labels.ravel())[1:]
    return labels == 1 + int(sizes.argmax())


def register(fixed: PixelSource, moving: PixelSource, method: Method = "auto") -> CoordinateMap:
    """Return the map from pixel coordinates of `fixed` to those of `moving`; affine unless the method is "bspline".

    Raises:
        DataError: no breast is found in an image.
        GigamorphError: the method is "simpleitk" or "bspline", but SimpleITK is not installed.
    """
    if method == "none":
        return Affine()
    if method == "auto":
        method = "simpleitk" if simpleitk() is not None else "gauss_newton"
    factor = max(1, max(*fixed.shape[1:], *moving.shape[1:]) // _SIDE)
    methods = {"simpleitk": itk_affine, "bspline": itk_free_form, "gauss_newton": _gauss_newton}
    found = methods[method](*(_small(source, factor) for source in (fixed, moving)))
    return Affine.scale(factor) @ found @ Affine.scale(1 / factor)


def resample_to(fixed: PixelSource, moving: PixelSource, method: Method = "auto") -> PixelSource:
    """Return `moving` in the geometry of `fixed`, read by region and black outside."""
    back = register(fixed, moving, method)
    if fixed.shape != moving.shape:
        moving = PaddedRegion(moving, 0, 0, max(fixed.shape[1], moving.shape[1]), max(fixed.shape[2], moving.shape[2]))
    seen = moving if back == Affine() else SampledSource(moving, back, "registered to the other breast")
    return seen if fixed.shape == seen.shape else PaddedRegion(seen, 0, 0, *fixed.shape[1:])


def downsampled(source: PixelSource, factor: int) -> PixelSource:
    """Return a `DownsampledSource`; registered images are sampled from averaged pixels instead of from each pixel."""
    if isinstance(source, PaddedRegion):
        return PaddedRegion(
            downsampled(source.source, factor), 0, 0, source.shape[1] // factor, source.shape[2] // factor
        )
    if isinstance(source, SampledSource):
        back = Affine.scale(1 / factor) @ source.back @ Affine.scale(factor)
        return SampledSource(DownsampledSource(source.source, factor), back, *source.added)
    return DownsampledSource(source, factor)


def _small(source: PixelSource, factor: int) -> Array:
    """Return the image averaged over blocks, with grey values from 0 (air) to 1."""
    source = DownsampledSource(source, factor) if factor > 1 else source
    _, height, width = source.shape
    image = source.read(0, height, 0, width).mean(0).double().numpy()
    mask = breast_mask(image)
    if not mask.any():
        raise DataError(f"{source.name}: no breast found, so it cannot be registered; remove the pair")
    image = np.where(mask, image - image.min(), 0.0)
    return image / np.percentile(image[mask], 99)


def _gauss_newton(fixed: Array, moving: Array) -> Affine:
    size = max(fixed.shape), max(fixed.shape)
    y, x = (axis.ravel() + 0.5 for axis in np.indices(fixed.shape, dtype=np.float64))
    # Scale coordinates to about one, so that all six numbers of the map have similar weight.
    design = np.stack([x / size[0], y / size[0], np.ones_like(x)], 1)
    shift_y, shift_x = _phase_correlation(fixed, moving)
    theta = np.array([[size[0], 0.0, shift_x], [0.0, size[0], shift_y]])
    for sigma in _SMOOTH:
        here, there = (ndimage.gaussian_filter(image, sigma) for image in (fixed, moving))
        slopes = np.gradient(there)
        for _ in range(_STEPS):
            to_x, to_y = design @ theta[0], design @ theta[1]
            position = np.stack([to_y - 0.5, to_x - 0.5])
            seen, slope_y, slope_x = (ndimage.map_coordinates(v, position, order=1) for v in (there, *slopes))
            jacobian = np.concatenate([slope_x[:, None] * design, slope_y[:, None] * design], 1)
            normal = jacobian.T @ jacobian
            step = np.linalg.solve(normal + 1e-9 * np.trace(normal) * np.eye(6), jacobian.T @ (here.ravel() - seen))
            theta += step.reshape(2, 3)
            if np.abs(step).max() < 1e-3:
                break
    (xx, xy, x0), (yx, yy, y0) = theta / np.array([size[0], size[0], 1.0])
    return Affine(float(xx), float(xy), float(x0), float(yx), float(yy), float(y0))


def _phase_correlation(fixed: Array, moving: Array) -> tuple[float, float]:
    """Return rows and columns by which the moving mask is shifted down and right."""
    shape = [2 * max(a, b) for a, b in zip(fixed.shape, moving.shape, strict=True)]
    spectra = [np.fft.rfft2(ndimage.gaussian_filter((image > 0).astype(float), 2), shape) for image in (fixed, moving)]
    cross = np.conj(spectra[0]) * spectra[1]
    peak = np.fft.irfft2(cross / np.sqrt(np.maximum(np.abs(cross), 1e-12)), shape)
    where = np.unravel_index(int(peak.argmax()), peak.shape)
    down, right = (float(w) if w < s / 2 else float(w - s) for w, s in zip(where, shape, strict=True))
    return down, right
