"""Registration: the map between both breasts, computed on small copies.

With SimpleITK see `itk`. Without it the map is affine: phase correlation of the breasts' masks gives the shift, then
Gauss-Newton steps reduce the mean square difference of the smoothed images (Lucas and Kanade, 1981, with the
gradient of the warped moving image times the coordinates).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ....datasets.sampling import SampledSource
from ....datasets.views import DownsampledSource
from ....errors import DataError
from ....images.affine import Affine, Map
from ....images.pixels import PixelSource
from ..sized import Window
from . import itk

Array = NDArray[np.float64]
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


def register(fixed: PixelSource, moving: PixelSource, method: Method = "auto") -> Map:
    """Return the map from pixel coordinates of `fixed` to those of `moving`; affine unless the method is "bspline".

    Raises:
        DataError: no breast is found in an image.
        GigamorphError: the method is "simpleitk" or "bspline", but SimpleITK is not installed.
    """
    if method == "none":
        return Affine()
    if method == "auto":
        method = "simpleitk" if itk.simpleitk() is not None else "gauss_newton"
    factor = max(1, max(*fixed.shape[1:], *moving.shape[1:]) // _SIDE)
    methods = {"simpleitk": itk.affine, "bspline": itk.free_form, "gauss_newton": _gauss_newton}
    found = methods[method](*(_small(source, factor) for source in (fixed, moving)))
    return Affine.scale(factor) @ found @ Affine.scale(1 / factor)


def resample_to(fixed: PixelSource, moving: PixelSource, method: Method = "auto") -> PixelSource:
    """Return `moving` in the geometry of `fixed`, read by region and black outside."""
    back = register(fixed, moving, method)
    if fixed.shape != moving.shape:
        moving = Window(moving, 0, 0, max(fixed.shape[1], moving.shape[1]), max(fixed.shape[2], moving.shape[2]))
    seen = moving if back == Affine() else SampledSource(moving, back, "registered to the other breast")
    return seen if fixed.shape == seen.shape else Window(seen, 0, 0, *fixed.shape[1:])


def downsampled(source: PixelSource, factor: int) -> PixelSource:
    """Return a `DownsampledSource`; registered images are sampled from averaged pixels instead of from each pixel."""
    if isinstance(source, Window):
        return Window(downsampled(source.source, factor), 0, 0, source.shape[1] // factor, source.shape[2] // factor)
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
