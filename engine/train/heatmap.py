"""Evidence drawn over the image at native resolution, strip by strip: no native-size float array is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import GigamorphError
from ..files import write_atomically
from ..images.pixels import PixelSource, as_stored
from .explanation import Explanation

_TILE = 512
# Above this a PNG (held whole, 3 bytes per pixel) would need more than 300 MB; a TIFF is written tile by tile.
PNG_PIXELS = 100_000_000


def overlay_name(stem: str, shape: tuple[int, int, int]) -> str:
    """``stem.png``, or ``stem.tif`` for images too large for a PNG that is held whole."""
    return stem + (".png" if shape[1] * shape[2] <= PNG_PIXELS else ".tif")


def write_overlay(found: Explanation, path: str | Path, *, stored: bool = False, caption: str = "") -> None:
    """Write an 8-bit RGB picture of the image in grey with what stands out (`Explanation.relative`) in red to yellow.

    Args:
        found: drawn bilinearly; the channels of its image are averaged.
        path: ``.png``, or ``.tif`` (tiled, deflate).
        stored: draw on the image as its file stores it, every pixel, the map carried back through mirroring and
            averaging; else on what the network saw.
        caption: written into the corner where least stands out.

    Raises:
        GigamorphError: if the file cannot be written, or has another suffix.
    """
    path = Path(path)
    source = as_stored(found.source) if stored else found.source
    strips = _strips(source, found.relative(), stored, caption)
    if path.suffix == ".png":
        picture = np.concatenate(list(strips)) if source.shape[1] <= _TILE else _gather(strips, source.shape)
        write_atomically(path, lambda p: p.write_bytes(imagecodecs.png_encode(picture, level=4)), "heat map")
    elif path.suffix in (".tif", ".tiff"):
        write_atomically(path, _tiff_writer(strips, source.shape), "heat map")
    else:
        raise GigamorphError(f"{path}: heat maps are written as .png or .tif")


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


def _strips(source: PixelSource, shown: Explanation, stored: bool, caption: str) -> Iterator[NDArray[np.uint8]]:
    """RGB strips of ``_TILE`` rows (the last one shorter), uint8 (rows, W, 3)."""
    _, height, width = source.shape
    low, high = _window(source)

    def grey_of(top: int, bottom: int, left: int, right: int) -> Tensor:
        return source.read(top, bottom, left, right).float().mean(0).sub_(low).div_(high - low).clamp_(0, 1)

    def heat_of(top: int, bottom: int, left: int, right: int) -> Tensor:
        return torch.from_numpy(shown.read(top, bottom, left, right, stored=stored)).clamp_(0, 1)

    note = _Caption(caption, height, width, lambda *box: (float(heat_of(*box).mean()), float(grey_of(*box).mean())))
    for top in range(0, height, _TILE):
        bottom = min(top + _TILE, height)
        grey = grey_of(top, bottom, 0, width)
        heat = torch.cat([heat_of(top, bottom, x, min(x + _TILE, width)) for x in range(0, width, _TILE)], 1)
        # Half-transparent at most, so that what lies below the evidence stays visible.
        alpha = heat.sqrt().mul_(0.6)
        rgb = torch.stack((grey * (1 - alpha) + alpha, grey * (1 - alpha) + alpha * heat, grey * (1 - alpha)), -1)
        yield note.written(rgb, top).mul_(255).round_().to(torch.uint8).numpy()


class _Caption:
    """A line of white text on dark ground in a corner of a picture.

    Args:
        look: (top, bottom, left, right) -> what the corner is chosen by, the least.
    """

    def __init__(
        self, text: str, height: int, width: int, look: Callable[[int, int, int, int], tuple[float, float]]
    ) -> None:
        self.ink, self.top, self.left = torch.zeros(0, 0), 0, 0
        if text:
            self.ink = _ink(text, max(10, min(height, width) // 40), width)[:height, :width]
            rows, columns = self.ink.shape
            corners = [(top, left) for top in (0, height - rows) for left in (0, width - columns)]
            self.top, self.left = min(corners, key=lambda at: look(at[0], at[0] + rows, at[1], at[1] + columns))

    def written(self, rgb: Tensor, top: int) -> Tensor:
        """A strip of the picture, (rows, W, 3) in [0, 1], that begins at row `top`, with its part of the text."""
        first, last = max(self.top, top), min(self.top + len(self.ink), top + len(rgb))
        if first < last:
            ink = self.ink[first - self.top : last - self.top, :, None]
            under = rgb[first - top : last - top, self.left : self.left + ink.shape[1]]
            under.copy_(under * 0.3 * (1 - ink) + ink)
        return rgb


def _ink(text: str, size: int, width: int) -> Tensor:
    """A line of text, `size` pixels high or what a picture's width allows: float32 (h, w), 1 where it is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, for captions alone
    from matplotlib.figure import Figure

    figure = Figure(dpi=72)  # so that points are pixels
    canvas = FigureCanvasAgg(figure)
    line = figure.text(0.5, 0.5, text, fontsize=size, ha="center", va="center", parse_math=False)
    needed = line.get_window_extent(canvas.get_renderer()).width + size
    scale = min(1.0, width / needed)
    line.set_fontsize(size * scale)
    figure.set_size_inches(max(1, needed * scale) / 72, max(1, 1.6 * size * scale) / 72)
    canvas.draw()
    return 1 - torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., 0].astype(np.float32) / 255)


def _window(source: PixelSource) -> tuple[float, float]:
    """The 0.5 and 99.8 percentiles of a sample of rows and columns."""
    _, height, width = source.shape
    step = max(1, width // 512)
    rows = [source.read(r, r + 1, 0, width)[..., ::step].mean(0) for r in range(0, height, max(1, height // 128))]
    sample = torch.cat(rows).flatten().float()
    low, high = (float(torch.quantile(sample, q)) for q in (0.005, 0.998))
    return low, high if high > low else low + 1.0
