"""Soft shapes as functions of the pixel's position: discs, ellipses and lines with a nearly Gaussian profile.

They use additions, multiplications, divisions and square roots only, for the reason in `texture`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...datasets.tables.schema import Box


@dataclass(frozen=True)
class Ellipse:
    """height * (1 - r^2)^power inside the ellipse r < 1, 0 outside; a higher power falls off more softly."""

    y: float
    x: float
    semi_y: float
    semi_x: float
    angle: float
    """The angle between the semi-axis `semi_x` and the columns axis, in radians."""
    height: float
    power: int
    """1, 2 or 4."""

    @property
    def reach(self) -> float:
        """The distance from the centre, in pixels, beyond which the shape is 0."""
        return max(self.semi_y, self.semi_x)

    def draw(self, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
        """Values at the offsets (rows, 1) and (1, columns) from the centre."""
        cos, sin = np.float32(math.cos(self.angle)), np.float32(math.sin(self.angle))
        along, across = (dx * cos + dy * sin) / np.float32(self.semi_x), (dy * cos - dx * sin) / np.float32(self.semi_y)
        inside = np.maximum(np.float32(1) - (along * along + across * across), np.float32(0))
        if self.power > 1:
            inside *= inside
        if self.power > 2:
            inside *= inside
        return inside * np.float32(self.height)


@dataclass(frozen=True)
class Line:
    """A straight line with a soft profile of standard deviation `sigma`, fading at its ends."""

    y: float
    x: float
    length: float
    sigma: float
    angle: float
    height: float

    @property
    def reach(self) -> float:
        """The distance from the centre, in pixels, beyond which the shape is 0."""
        return self.length / 2 + 3 * self.sigma

    def draw(self, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
        """Values at the offsets (rows, 1) and (1, columns) from the centre."""
        cos, sin = np.float32(math.cos(self.angle)), np.float32(math.sin(self.angle))
        across, along = dx * sin - dy * cos, dx * cos + dy * sin
        # (1 - t^2 / 8)^4 approximates exp(-t^2 / 2) with a finite support.
        profile = np.maximum(np.float32(1) - across * across / np.float32(8 * self.sigma**2), np.float32(0))
        profile *= profile
        profile *= profile
        profile *= np.clip((np.float32(self.length / 2) - np.abs(along)) / np.float32(2 * self.sigma), 0, 1)
        return profile * np.float32(self.height)


Shape = Ellipse | Line


def box_of(shape: Shape, height: int, width: int) -> Box:
    """The box of the image outside of which the shape is 0."""
    reach = shape.reach
    top, bottom = math.floor(shape.y - reach), math.ceil(shape.y + reach) + 1
    left, right = math.floor(shape.x - reach), math.ceil(shape.x + reach) + 1
    return max(top, 0), min(bottom, height), max(left, 0), min(right, width)


def overlap(first: Box, second: Box) -> Box | None:
    """The intersection of two boxes; None if it is empty."""
    top, bottom = max(first[0], second[0]), min(first[1], second[1])
    left, right = max(first[2], second[2]), min(first[3], second[3])
    return (top, bottom, left, right) if top < bottom and left < right else None


def add(shape: Shape, image: np.ndarray, region: Box, box: Box) -> None:
    """Add the shape, whose box is `box`, to the pixels of a region of the image."""
    shared = overlap(region, box)
    if shared is None:
        return
    dy = (np.arange(shared[0], shared[1], dtype=np.float32) - np.float32(shape.y))[:, None]
    dx = (np.arange(shared[2], shared[3], dtype=np.float32) - np.float32(shape.x))[None, :]
    image[shared[0] - region[0] : shared[1] - region[0], shared[2] - region[2] : shared[3] - region[2]] += shape.draw(
        dy, dx
    )
