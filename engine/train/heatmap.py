"""Evidence drawn over the image at native resolution, strip by strip: no native-size float array is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import GigamorphError
from ..images.affine import Affine, Map
from ..images.pixels import PixelSource, as_stored, to_original
from .checkpoint import write_atomically

_TILE = 512
# Above this a PNG (held whole, 3 bytes per pixel) would need more than 300 MB; a TIFF is written tile by tile.
PNG_PIXELS = 100_000_000


def overlay_name(stem: str, shape: tuple[int, int, int]) -> str:
    """``stem.png``, or ``stem.tif`` for images too large for a PNG that is held whole."""
    return stem + (".png" if shape[1] * shape[2] <= PNG_PIXELS else ".tif")


def write_overlay(source: PixelSource, evidence: Tensor, path: str | Path, *, stored: bool = False) -> None:
    """Write an 8-bit RGB picture of the image in grey with the positive evidence in red to yellow.

    The evidence that half of the image has anyway (its median, where that is positive) is left uncoloured.

    Args:
        source: the image (C, H, W) that the network saw; its channels are averaged.
        evidence: (h, w) float, at the network's stride; drawn bilinearly, scaled to its own maximum.
        path: ``.png``, or ``.tif`` (tiled, deflate).
        stored: draw on the image as its file stores it, every pixel, the evidence carried back through mirroring and
            averaging; else on what the network saw.

    Raises:
        GigamorphError: if the file cannot be written, or has another suffix.
    """
    path = Path(path)
    place = cells_to_pixels(source, evidence.shape, stored=stored)
    source = as_stored(source) if stored else source
    strips = _strips(source, evidence, place)
    if path.suffix == ".png":
        picture = np.concatenate(list(strips)) if source.shape[1] <= _TILE else _gather(strips, source.shape)
        write_atomically(path, lambda p: p.write_bytes(imagecodecs.png_encode(picture, level=4)), "heat map")
    elif path.suffix in (".tif", ".tiff"):
        write_atomically(path, _tiff_writer(strips, source.shape), "heat map")
    else:
        raise GigamorphError(f"{path}: heat maps are written as .png or .tif")


def cells_to_pixels(source: PixelSource, shape: Sequence[int], *, stored: bool) -> Map:
    """From the cells of a map (h, w) of all of an image to the pixels of that image, or (stored) of its file."""
    place: Map = Affine.scale(source.shape[2] / shape[1], source.shape[1] / shape[0])
    return to_original(as_stored(source)).inverse() @ to_original(source) @ place if stored else place


def relative(evidence: Tensor) -> Tensor:
    """Positive evidence, less what half of the image has anyway, as a share of its maximum: float32 in [0, 1]."""
    positive = evidence.detach().float().cpu()
    positive = (positive - positive.median().clamp(min=0)).clamp(min=0)
    return positive / positive.max().clamp(min=torch.finfo(torch.float32).tiny)


def _gather(strips: Iterator[NDArray[np.uint8]], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    picture = np.empty((shape[1], shape[2], 3), np.uint8)
    top = 0
    for strip in strips:
        picture[top : top + len(strip)] = strip
        top += len(strip)
    return picture


def _tiff_writer(strips: Iterator[NDArray[np.uint8]], shape: tuple[int, int, int]) -> Callable[[Path], None]:
    def tiles() -> Iterator[NDArray[np.uint8]]:
        for strip in strips:
            for left in range(0, shape[2], _TILE):
                yield np.ascontiguousarray(strip[:, left : left + _TILE])

    def write(path: Path) -> None:
        tifffile.imwrite(
            path,
            tiles(),
            shape=(shape[1], shape[2], 3),
            dtype=np.uint8,
            tile=(_TILE, _TILE),
            compression="zlib",
            photometric="rgb",
            bigtiff=shape[1] * shape[2] > 2**30,
        )

    return write


def _strips(source: PixelSource, evidence: Tensor, place: Map) -> Iterator[NDArray[np.uint8]]:
    """RGB strips of ``_TILE`` rows (the last one shorter), uint8 (rows, W, 3); ``place`` leads from cells to pixels."""
    _, height, width = source.shape
    low, high = _window(source)
    shown = relative(evidence).numpy()
    for top in range(0, height, _TILE):
        bottom = min(top + _TILE, height)
        grey = source.read(top, bottom, 0, width).float().mean(0).sub_(low).div_(high - low).clamp_(0, 1)
        parts = [place.resample(shown, top, bottom, left, min(left + _TILE, width)) for left in range(0, width, _TILE)]
        heat = torch.from_numpy(np.concatenate(parts, 1))
        # Half-transparent at most, so that what lies below the evidence stays visible.
        alpha = heat.clamp(0, 1).sqrt().mul_(0.6)
        rgb = torch.stack((grey * (1 - alpha) + alpha, grey * (1 - alpha) + alpha * heat, grey * (1 - alpha)), -1)
        yield rgb.mul_(255).round_().to(torch.uint8).numpy()


def _window(source: PixelSource) -> tuple[float, float]:
    """The 0.5 and 99.8 percentiles of a sample of rows and columns."""
    _, height, width = source.shape
    step = max(1, width // 512)
    rows = [source.read(r, r + 1, 0, width)[..., ::step].mean(0) for r in range(0, height, max(1, height // 128))]
    sample = torch.cat(rows).flatten().float()
    low, high = (float(torch.quantile(sample, q)) for q in (0.005, 0.998))
    return low, high if high > low else low + 1.0
