"""Previews of a network's input: statistics, a PNG, and a thumbnail for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ..images.levels import require_numbers
from ..images.pixels import ImageSource, PixelSource, steps_of
from ..images.writers import PNG_PIXELS, write_grey
from .grey import odd_range
from .views import DownsampledSource, NormalizedSource

Input = ImageSource | NormalizedSource
_ROWS = 256
# Normalised images rarely have larger values.
_FAR = 20.0


@dataclass(frozen=True)
class Preview:
    """Statistics of a network's input."""

    shape: tuple[int, ...]
    steps: tuple[str, ...]
    """All steps that were applied to the file's pixels, in order."""
    least: float
    mean: float
    std: float
    most: float
    black: float
    """Share of the pixels with grey value 0: background, or clipped by the window."""
    white: float
    """Share of the pixels with grey value 1."""
    odd: str = ""
    """The problem of the range of grey values; empty without one."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings that follow from the statistics."""
        found = [self.odd] if self.odd else []
        if self.least == self.most:
            found.append("all pixels are equal")
        if self.white > 0.05:
            found.append(f"{self.white:.1%} of the pixels are white: the window may clip tissue")
        if self.black > 0.95:
            found.append(f"{self.black:.1%} of the pixels are black")
        if max(abs(self.least), abs(self.most)) > _FAR:
            found.append(f"values reach {max(self.least, self.most, key=abs):.4g}: mean and std do not fit this image")
        return tuple(found)


def preview(source: Input) -> Preview:
    """Read the image once, a few rows at a time, and return its statistics.

    Raises:
        DataError: if it cannot be read, or holds NaN or infinite pixels.
    """
    _, height, width = source.shape
    total = squares = 0.0
    least, most = math.inf, -math.inf
    black = white = 0
    brightest = np.full(source.shape[0], -math.inf)
    low, high = _grey(source, np.float32(0)), _grey(source, np.float32(1))
    for top in range(0, height, _ROWS):
        pixels = source.read(top, min(top + _ROWS, height), 0, width)
        require_numbers(pixels, f"{source.name}: ")
        strip = pixels.numpy()
        total += float(strip.sum(dtype=np.float64))
        squares += float(np.square(strip, dtype=np.float64).sum())
        least, most = min(least, float(strip.min())), max(most, float(strip.max()))
        brightest = np.maximum(brightest, strip.max((1, 2)))
        black += int((strip <= low).sum())
        white += int((strip >= high).sum())
    count = math.prod(source.shape)
    mean = total / count
    std = math.sqrt(max(squares / count - mean * mean, 0.0))
    means, stds = (np.array(values) for values in source.normalize.per_channel(source.shape[0]))
    odd = odd_range(source, float((brightest * stds + means).max())) if isinstance(source, ImageSource) else ""
    return Preview(source.shape, steps_of(source), least, mean, std, most, black / count, white / count, odd)


def _grey(source: Input, grey: np.float32) -> np.ndarray:
    """The normalised value of a grey value per channel, computed as in the source."""
    mean, std = source.normalize.per_channel(source.shape[0])
    return ((np.float64(grey) - np.array(mean)) / np.array(std)).astype(np.float32)[:, None, None]


def write_preview(source: Input, path: str | Path) -> str:
    """Write a network's input as a 16-bit grey PNG, 0 black to 65535 white, before mean and std.

    Images above 64 million pixels are averaged over blocks until they fit. Returns a description of the resolution.
    """
    path = Path(path)
    shown: PixelSource = source
    note = "every pixel"
    factor = math.ceil(math.sqrt(source.shape[1] * source.shape[2] / PNG_PIXELS))
    if factor > 1:
        shown, note = DownsampledSource(source, factor), f"mean over blocks of {factor} x {factor} pixels"

    def read(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return _levels(source, shown.read(top, bottom, left, right), 65535).astype(np.uint16)

    write_grey(path, (shown.shape[1], shown.shape[2]), np.uint16, read)
    return note


def thumbnail(source: Input, columns: int, rows: int) -> np.ndarray:
    """Grey values averaged over square blocks, uint8 (height, width), at most `rows` x `columns`."""
    factor = max(1, math.ceil(max(source.shape[1] / rows, source.shape[2] / columns)))
    factor = min(factor, source.shape[1], source.shape[2])
    shown = DownsampledSource(source, factor)
    return _levels(source, shown.read(0, shown.shape[1], 0, shown.shape[2]), 255).astype(np.uint8)


def _levels(source: Input, pixels: Tensor, white: int) -> np.ndarray:
    """Grey levels from 0 black to `white` of normalised pixels, averaged over the channels."""
    means, stds = source.normalize.per_channel(source.shape[0])
    grey = (pixels.numpy() * np.array(stds)[:, None, None] + np.array(means)[:, None, None]).mean(0)
    return np.rint(np.clip(grey, 0, 1) * white)
