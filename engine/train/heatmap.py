"""Draws evidence over the image at native resolution, in strips, without a float array of the full size."""

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
# A larger PNG (in memory as a whole, 3 bytes per pixel) would need more than 300 MB; a TIFF is written tile by tile.
PNG_PIXELS = 100_000_000


def overlay_name(stem: str, shape: tuple[int, ...]) -> str:
    """``stem.png``, or ``stem.tif`` if a PNG would take too much memory."""
    return stem + (".png" if shape[-2] * shape[-1] <= PNG_PIXELS else ".tif")


def write_overlay(found: Explanation, path: str | Path, *, stored: bool = False, caption: str = "") -> None:
    """Write an 8-bit RGB picture: the image in grey, overlaid with `Explanation.relative` in red to yellow.

    Args:
        found: the map, drawn bilinearly; the channels of its image are averaged.
        path: ``.png``, or ``.tif`` (tiled, deflate).
        stored: draw on all pixels of the stored file, with mirroring and averaging of the map undone; else on the image
            that the network saw.
        caption: text, drawn in the corner with the least evidence.

    Raises:
        GigamorphError: if the file cannot be written, or has another suffix.
    """
    path = Path(path)
    source = as_stored(found.source) if stored else found.source
    strips = _strips(source, found.relative(), stored, caption)
    if path.suffix == ".png":
        picture = np.concatenate(list(strips)) if source.shape[-2] <= _TILE else _gather(strips, source.shape)
        write_atomically(path, lambda p: p.write_bytes(imagecodecs.png_encode(picture, level=4)), "heat map")
    elif path.suffix in (".tif", ".tiff"):
        write_atomically(path, _tiff_writer(strips, source.shape), "heat map")
    else:
        raise GigamorphError(f"{path}: the suffix of a heat map must be .png or .tif")


def _gather(strips: Iterator[NDArray[np.uint8]], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    picture = np.empty((*shape[-2:], 3), np.uint8)
    top = 0
    for strip in strips:
        picture[top : top + len(strip)] = strip
        top += len(strip)
    return picture


def _tiff_writer(strips: Iterator[NDArray[np.uint8]], shape: tuple[int, ...]) -> Callable[[Path], None]:
    def tiles() -> Iterator[NDArray[np.uint8]]:
        for strip in strips:
            for left in range(0, shape[-1], _TILE):
                yield np.ascontiguousarray(strip[:, left : left + _TILE])

    def write(path: Path) -> None:
        tifffile.imwrite(
            path,
            tiles(),
            shape=(*shape[-2:], 3),
            dtype=np.uint8,
            tile=(_TILE, _TILE),
            compression="zlib",
            photometric="rgb",
            bigtiff=shape[-2] * shape[-1] > 2**30,
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
        yield note.written(_coloured(grey, heat), top).mul_(255).round_().to(torch.uint8).numpy()


def _coloured(grey: Tensor, heat: Tensor) -> Tensor:
    """Colours (h, w, 3); at most half opaque, so that the image stays visible below the evidence."""
    alpha = heat.sqrt().mul_(0.6)
    return torch.stack((grey * (1 - alpha) + alpha, grey * (1 - alpha) + alpha * heat, grey * (1 - alpha)), -1)


class _Caption:
    """A line of white text above a colour bar from 0 to 1, on a dark background in a corner of a picture.

    Args:
        text: the line; empty for none.
        height, width: of the picture.
        look: (top, bottom, left, right) -> a rating of this box; the corner with the lowest rating is used.
    """

    def __init__(
        self, text: str, height: int, width: int, look: Callable[[int, int, int, int], tuple[float, float]]
    ) -> None:
        self.paint, self.top, self.left = torch.zeros(0, 0, 3), 0, 0
        if text:
            size = max(10, min(height, width) // 40)
            line = _ink(text, size, width)
            scale = [_ink(end, size * 3 // 5, width) for end in ("0", "1")]
            colours = torch.zeros(len(scale[0]), max(0, line.shape[1] - scale[0].shape[1] - scale[1].shape[1]), 3)
            middle = colours[len(colours) // 4 : -(len(colours) // 4)]  # as high as the digits
            middle.copy_(_coloured(torch.zeros(()), torch.linspace(0, 1, colours.shape[1])))
            bar = torch.cat([scale[0], colours, scale[1]], 1)[:, : line.shape[1]]
            self.paint = torch.cat([line, bar])[:height, :width]
            rows, columns, _ = self.paint.shape
            corners = [(top, left) for top in (0, height - rows) for left in (0, width - columns)]
            self.top, self.left = min(corners, key=lambda at: look(at[0], at[0] + rows, at[1], at[1] + columns))

    def written(self, rgb: Tensor, top: int) -> Tensor:
        """Draw the text into a strip of the picture, (rows, W, 3) in [0, 1], that begins at row `top`."""
        first, last = max(self.top, top), min(self.top + len(self.paint), top + len(rgb))
        if first < last:
            paint = self.paint[first - self.top : last - self.top]
            under = rgb[first - top : last - top, self.left : self.left + paint.shape[1]]
            under.copy_(under * 0.3 * (1 - paint.amax(-1, keepdim=True)) + paint)
        return rgb


def _ink(text: str, size: int, width: int) -> Tensor:
    """A line of white text, float32 (h, w, 3) in [0, 1], `size` pixels high or less if the width requires it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second; only captions need it
    from matplotlib.figure import Figure

    figure = Figure(dpi=72)  # so that points are pixels
    canvas = FigureCanvasAgg(figure)
    line = figure.text(0.5, 0.5, text, fontsize=size, ha="center", va="center", parse_math=False)
    needed = line.get_window_extent(canvas.get_renderer()).width + size
    scale = min(1.0, width / needed)
    line.set_fontsize(size * scale)
    figure.set_size_inches(max(1, needed * scale) / 72, max(1, 1.6 * size * scale) / 72)
    canvas.draw()
    return 1 - torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255)


def _window(source: PixelSource) -> tuple[float, float]:
    """The 0.5 and 99.8 percentiles of a sample of rows and columns."""
    _, height, width = source.shape
    step = max(1, width // 512)
    rows = [source.read(r, r + 1, 0, width)[..., ::step].mean(0) for r in range(0, height, max(1, height // 128))]
    sample = torch.cat(rows).flatten().float()
    low, high = (float(torch.quantile(sample, q)) for q in (0.005, 0.998))
    return low, high if high > low else low + 1.0
