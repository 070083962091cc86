"""Augmentation: random variations of training images, identical for whole images and tiles.

The random numbers depend on (seed, epoch, index of the image) only, and a pixel's value on its position in the image.
So a resumed run, another tile size and several processes that share an image see the same image.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..images.affine import Affine, CoordinateMap, Coordinates
from ..images.pixels import DerivedSource, PixelSource, check_region
from .counter_random import key_of, normal, uniform
from .flips import FLIPS
from .views import MirroredSource, SampledSource

_Four = tuple[np.ndarray, ...]
_CLOSE = 1e-6  # pixels: the accuracy of the inverse
_ORIGIN = 2**30  # makes counters of negative grid points positive
_ROWS = 64  # few enough that the results of a step are still in the cache for the next one


def _limit(most: float) -> Any:
    return field(default=0.0, metadata={"most": most})


@dataclass(frozen=True)
class Augment:
    """The limits of the variations; each is drawn uniformly within its limits, once per image and epoch.

    `parse` reads it from text and `str` writes it: "flip,rotate=10,scale=0.1,elastic=20:200,noise=0.01".
    """

    flip: str = ""
    """"left-right", "up-down" or "both" (written "flip"); each mirroring has probability 1/2."""
    rotate: float = _limit(180)
    """Degrees in either direction around the centre of the image."""
    scale: float = _limit(1)
    """0.1: factors from 1/1.1 to 1.1, uniform in the logarithm."""
    shear: float = _limit(45)
    """Degrees in either direction."""
    translate: float = _limit(1e6)
    """Whole pixels in either direction along both axes."""
    elastic: float = _limit(1e6)
    """The largest displacement along each axis, in pixels."""
    elastic_grid: float = 0.0
    """The distance in pixels of the grid points with random displacements; 0 for 10 times `elastic`."""
    gamma: float = _limit(4)
    """0.2: exponents from 1/1.2 to 1.2, uniform in the logarithm."""
    contrast: float = _limit(1)
    """0.2: grey values times 0.8 to 1.2."""
    brightness: float = _limit(1)
    """0.1: grey values (0 black, 1 white) plus -0.1 to 0.1."""
    noise: float = _limit(1)
    """The largest standard deviation, in units of grey values."""

    def __post_init__(self) -> None:
        if self.flip not in ("", *FLIPS):
            raise DataError(f"augmentation flip={self.flip}: must be flip, flip=left-right or flip=up-down")
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise DataError(f"augmentation {name}={value:g}: must be between 0 and {most:g}")
        if not (self.elastic_grid == 0 or Elastic.LEAST * self.elastic <= self.elastic_grid < math.inf):
            raise DataError(
                f"augmentation elastic={self.elastic:g}:{self.elastic_grid:g}: the grid must be at least "
                f"{Elastic.LEAST:g} times as wide as the displacement, or the image would fold"
            )

    @classmethod
    def parse(cls, text: str) -> Augment:
        """The inverse of `str`; a `DataError` names the part that is wrong."""
        values: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, given, value = (piece.strip() for piece in part.partition("="))
            if name in values:
                raise DataError(f"augmentation {part}: {name} is given twice")
            if name == "flip":
                values[name] = value if given else "both"
            elif name not in _LIMITS:
                raise DataError(f"augmentation {part}: unknown; choose from flip, {', '.join(_LIMITS)}")
            elif name == "elastic" and ":" in value:
                size, _, grid = value.partition(":")
                values[name], values["elastic_grid"] = _number(part, size), _number(part, grid)
            else:
                values[name] = _number(part, value)
        return cls(**values)

    def __str__(self) -> str:
        parts = [] if not self.flip else ["flip"] if self.flip == "both" else [f"flip={self.flip}"]
        for name in _LIMITS:
            value = getattr(self, name)
            if value:
                grid = f":{_text(self.elastic_grid)}" if name == "elastic" and self.elastic_grid else ""
                parts.append(f"{name}={_text(value)}{grid}")
        return ",".join(parts)


_LIMITS: dict[str, float] = {own.name: own.metadata["most"] for own in fields(Augment) if own.metadata}


def _number(part: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"augmentation {part}: {text or 'nothing'!r} is not a number, as in rotate=10") from None


def _text(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def augmented(source: PixelSource, augment: Augment, *, seed: int, epoch: int, index: int) -> PixelSource:
    """The source with the variations of an epoch: mirrored, moved, then changed in grey; steps without effect left out.

    Grey values are those before normalisation, 0 black to 1 white. Points beyond the image are black.
    """
    draw = _Draw(seed, epoch, index)
    mirrored = [draw.one() < 0.5 and allowed for allowed in FLIPS.get(augment.flip, (False, False))]
    if any(mirrored):
        source = MirroredSource(source, left_right=mirrored[0], up_down=mirrored[1])
    move, steps = _move(augment, draw, source.shape)
    back: CoordinateMap = move.inverse()
    if augment.elastic:
        grid = augment.elastic_grid or 10 * augment.elastic
        back @= Elastic((draw.key(0), draw.key(1)), augment.elastic, grid)
        steps.append(f"bent by up to {augment.elastic:g} pixels on a grid of {grid:g}")
    if steps:
        source = SampledSource(source, back, ", ".join(steps))
    intensity = Intensity(
        draw.key(2),
        gamma=math.exp(draw.within(math.log1p(augment.gamma))),
        contrast=1 + draw.within(augment.contrast),
        brightness=draw.within(augment.brightness),
        noise=draw.one() * augment.noise,
    )
    return IntensitySource(source, intensity) if intensity.steps else source


class _Draw:
    """The random numbers of an image in an epoch, in a fixed order, so an option does not change those of others."""

    def __init__(self, *image: int) -> None:
        self._image, self._count = image, 0

    def key(self, purpose: int) -> np.uint64:
        return key_of(*self._image, 1 + purpose)

    def one(self) -> float:
        """A uniform number in [0, 1)."""
        self._count += 1
        return float(uniform(key_of(*self._image, 0), np.array([self._count], np.uint64))[0])

    def within(self, limit: float) -> float:
        """A uniform number in [-limit, limit)."""
        return (2 * self.one() - 1) * limit


def _move(augment: Augment, draw: _Draw, shape: tuple[int, ...]) -> tuple[Affine, list[str]]:
    """The map of the image's points (scaled, sheared and rotated around the centre, then shifted) and its steps."""
    angle, shear = draw.within(augment.rotate), draw.within(augment.shear)
    scale = math.exp(draw.within(math.log1p(augment.scale)))
    right, down = (float(round(draw.within(augment.translate))) for _ in "xy")
    x, y = shape[-1] / 2, shape[-2] / 2
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned = Affine(xx=cos, xy=-sin, yx=sin, yy=cos)
    sheared = Affine(xy=math.tan(math.radians(shear)))
    around = turned @ sheared @ Affine.scale(scale)
    named = {
        f"{scale:.4g} times as large": scale != 1,
        f"sheared by {shear:.4g} degrees": shear != 0,
        f"turned by {angle:.4g} degrees": angle != 0,
        f"moved by {right:+g} pixels in x, {down:+g} in y": (right, down) != (0, 0),
    }
    move = Affine.shift(x + right, y + down) @ around @ Affine.shift(-x, -y)
    return move, [step for step, is_done in named.items() if is_done]


@dataclass(frozen=True)
class Intensity:
    """grey -> contrast * grey**gamma + brightness + noise * n(row, column), n normal with mean 0 and deviation 1.

    Negative values of float images keep their sign under gamma. Values below black or above white are not clipped. All
    channels and slices of a pixel get the same noise, so grey stays grey.
    """

    key: np.uint64
    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    noise: float = 0.0

    def apply(self, grey: np.ndarray, top: int, left: int) -> None:
        """Change grey values, float32 (..., rows, columns), in place; the first pixel is at (top, left).

        Each pixel is computed independently in float32, so a region has the same bits as in the whole image.
        """
        if self.gamma != 1:
            np.copysign(np.power(np.abs(grey), np.float32(self.gamma)), grey, out=grey)
        if self.contrast != 1:
            grey *= np.float32(self.contrast)
        if self.brightness:
            grey += np.float32(self.brightness)
        if self.noise:
            rows, columns = np.ogrid[top : top + grey.shape[-2], left : left + grey.shape[-1]]
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
            self.intensity.apply(grey[..., first : first + _ROWS, :], top + first, left)
        return torch.from_numpy(grey)


@dataclass(frozen=True)
class Elastic(CoordinateMap):
    """A smooth random displacement of each point, computed for the requested points only; sizes are in pixels.

        (x, y) -> (x, y) + sum over grid points g of p(g) B((x, y) / spacing - g)

    B is the uniform cubic B-spline in both directions, p(g) a random vector of the grid point g within +-size: the
    free-form deformation of Rueckert et al. (IEEE TMI 18, 1999). The weights of the 16 grid points around a point are
    positive and sum to one, so no component of a displacement exceeds `size`. Along an axis it changes by at most
    2 size / spacing per pixel, so with spacing > 4 size the map is injective, and its inverse is found by iteration.

    Args:
        keys: the keys of the random displacements in x and in y.
        size: the largest displacement in each direction.
        spacing: the distance of the grid points, at least 5 times `size`.
    """

    keys: tuple[np.uint64, np.uint64]
    size: float
    spacing: float

    LEAST: ClassVar[float] = 5.0
    """The smallest ratio of spacing to size; neighbouring points then approach by at most 4/5 of their distance."""

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        move_x, move_y = self.displacement(x, y)
        return x + move_x, y + move_y

    def displacement(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        """The float64 (x, y) displacements at points; fastest for a region: an ascending row of x and column of y."""
        j, weights_x = _weights(x, self.spacing)
        i, weights_y = _weights(y, self.spacing)
        if x.ndim == y.ndim == 2 and len(x) == 1 and y.shape[1] == 1:
            move_x, move_y = (self._region(key, i[:, 0], j[0], weights_y, weights_x) for key in self.keys)
        else:
            move_x, move_y = (self._scattered(key, i, j, weights_y, weights_x) for key in self.keys)
        return move_x, move_y

    def inverse(self) -> CoordinateMap:
        return _Inverse(self)

    def _region(self, key: np.uint64, i: np.ndarray, j: np.ndarray, weights_y: _Four, weights_x: _Four) -> np.ndarray:
        """The spline at the pixels of a region, first along the rows of the grid, then along its columns."""
        rows, columns = (np.arange(int(n[0]), int(n[-1]) + 4) for n in (i, j))
        grid = self._grid(key, rows[:, None], columns)
        along = _sum([grid[:, j - columns[0] + k] * weights_x[k] for k in range(4)])
        out = np.empty((len(i), len(j)))
        for first in range(int(i[0]), int(i[-1]) + 1):
            own = slice(*np.searchsorted(i, [first, first + 1]))
            out[own] = _sum([weights_y[k][own] * along[first - rows[0] + k] for k in range(4)])
        return out

    def _scattered(
        self, key: np.uint64, i: np.ndarray, j: np.ndarray, weights_y: _Four, weights_x: _Four
    ) -> np.ndarray:
        return _sum(
            [weights_y[k] * _sum([self._grid(key, i + k, j + n) * weights_x[n] for n in range(4)]) for k in range(4)]
        )

    def _grid(self, key: np.uint64, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """A component of the random vectors of grid points, float64."""
        return (uniform(key, (row + _ORIGIN << 32 | column + _ORIGIN).astype(np.uint64)) * 2 - 1) * self.size


@dataclass(frozen=True)
class _Inverse(CoordinateMap):
    """The inverse of a deformation."""

    forward: Elastic

    def at(self, x: np.ndarray, y: np.ndarray) -> Coordinates:
        back_x, back_y = np.broadcast_arrays(x, y)
        # Each step reduces the error at least by the factor 4 size / spacing.
        distance, factor = self.forward.size, 4 * self.forward.size / self.forward.spacing
        while distance > _CLOSE:
            move_x, move_y = self.forward.displacement(back_x, back_y)
            back_x, back_y = x - move_x, y - move_y
            distance *= factor
        return back_x, back_y

    def inverse(self) -> Elastic:
        return self.forward


def _weights(positions: np.ndarray, spacing: float) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The first of the four grid points around each position, and the four values of the cubic B-spline."""
    first = np.floor(positions / spacing)
    t = positions / spacing - first
    s = 1 - t
    square = t * t
    return first.astype(np.int64) - 1, (
        s * s * s / 6,
        (square * t * 3 - square * 6 + 4) / 6,
        (square * t * -3 + square * 3 + t * 3 + 1) / 6,
        square * t / 6,
    )


def _sum(four: list[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, four)
