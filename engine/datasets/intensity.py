"""Pixelwise changes of grey values: gamma, contrast, brightness, and noise that depends on the pixel's position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..images.pixels import DerivedSource, PixelSource, check_region
from .counter_random import normal

_ROWS = 64  # few enough that the results of a step are still in the cache for the next one


@dataclass(frozen=True)
class Intensity:
    """grey -> contrast * grey**gamma + brightness + noise * n(row, column), n normal with mean 0 and deviation 1.

    Negative values of float images keep their sign under gamma. Values below black or above white are not clipped. All
    channels of a pixel get the same noise, so grey stays grey.
    """

    key: np.uint64
    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    noise: float = 0.0

    def apply(self, grey: np.ndarray, top: int, left: int) -> None:
        """Change grey values, float32 (channels, rows, columns), in place; the first pixel is at (top, left).

        Each pixel is computed independently in float32, so a region has the same bits as in the whole image.
        """
        if self.gamma != 1:
            np.copysign(np.power(np.abs(grey), np.float32(self.gamma)), grey, out=grey)
        if self.contrast != 1:
            grey *= np.float32(self.contrast)
        if self.brightness:
            grey += np.float32(self.brightness)
        if self.noise:
            rows, columns = np.ogrid[top : top + grey.shape[1], left : left + grey.shape[2]]
            grey += normal(self.key, (rows << 32 | columns).astype(np.uint64)) * np.float32(self.noise)

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the changes, in order."""
        named = {
            f"gamma {self.gamma:.4g}": self.gamma != 1,
            f"contrast times {self.contrast:.4g}": self.contrast != 1,
            f"brightness {self.brightness:+.4g}": self.brightness != 0,
            f"noise of standard deviation {self.noise:.4g}": self.noise != 0,
        }
        return tuple(step for step, is_done in named.items() if is_done)


class IntensitySource(DerivedSource):
    """An image of grey values, 0 black to 1 white, with changed intensities."""

    def __init__(self, source: PixelSource, intensity: Intensity) -> None:
        super().__init__(source)
        self.intensity, self.added = intensity, intensity.steps

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        check_region(self.shape, top, bottom, left, right, self.name)
        grey = self.source.read(top, bottom, left, right).cpu().contiguous().numpy()
        for first in range(0, bottom - top, _ROWS):
            self.intensity.apply(grey[:, first : first + _ROWS], top + first, left)
        return torch.from_numpy(grey)
