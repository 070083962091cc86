"""A phantom mammogram: anatomy and lesions from seeds, pixels and masks of any region.

Texture and shapes are functions of a position and a key, so that each region is computed independently. They use
additions, multiplications, divisions and square roots of whole arrays only, which IEEE 754 rounds correctly: a pixel
has the same bits in each region that contains it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ...datasets.counter_random import STEP, bits, mix
from ...datasets.tables.schema import Box
from ...errors import DataError

# The sum of four uniform 16-bit numbers: mean, and standard deviation.
_MEAN, _STD = 2 * 65535.0, float(np.sqrt(4 * (2.0**32 - 1) / 12))
# The mean square of a cubic B-spline over its period, per axis: the variance relative to that of the coefficients.
_SPLINE = 151 / 315


def normals(key: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """Independent, nearly normal values of mean 0 and variance 1, float32 (bottom - top, right - left).

    Positions may be negative. Counter-based: SplitMix64 (Steele, Lea and Flood, 2014) of the row, then of the column;
    four 16-bit parts are added.
    """
    rows, columns = (np.arange(a, b, dtype=np.int64).view(np.uint64) for a, b in ((top, bottom), (left, right)))
    parts = (
        mix(bits(np.uint64(key), rows)[:, None] + columns * STEP).view(np.uint16).reshape(len(rows), len(columns), 4)
    )
    total = parts[..., 0].astype(np.float32)
    for part in range(1, 4):
        total += parts[..., part]
    total -= np.float32(_MEAN)
    total *= np.float32(1 / _STD)
    return total


def power_law(keys: tuple[int, int], symmetry: float, longest: int, region: tuple[int, int, int, int]) -> np.ndarray:
    """A float32 field of mean 0 and variance 1 in a region, with the power spectrum of breast tissue (Burgess, 1999).

    The power falls as 1/f^3 from wavelengths of about 2 * longest pixels on. The field is a sum of cubic B-splines of
    periods longest, longest / 2, ..., 1: each level is the refinement of the previous one plus new coefficients, whose
    deviation falls by the square root of 2 per level.

    Args:
        keys, symmetry: coefficients are symmetry * those of the first key + sqrt(1 - symmetry^2) * those of the second.
        longest: a power of two.
        region: top, bottom, left, right.
    """
    levels = longest.bit_length() - 1
    variance = sum(2.0**level for level in range(levels + 1)) * _SPLINE**2
    ranges = [region]
    for _ in range(levels):
        top, bottom, left, right = ranges[-1]
        ranges.append((top // 2 - 1, (bottom + 1) // 2 + 2, left // 2 - 1, (right + 1) // 2 + 2))
    field = _coefficients(keys, symmetry, levels, ranges[-1])
    field *= np.float32(np.sqrt(2.0**levels / variance))
    for level in range(levels - 1, -1, -1):
        field = _refine(_refine(field, ranges[level + 1], ranges[level], 0), ranges[level + 1], ranges[level], 1)
        new = _coefficients(keys, symmetry, level, ranges[level])
        new *= np.float32(np.sqrt(2.0**level / variance))
        field += new
    return field


def _coefficients(keys: tuple[int, int], symmetry: float, level: int, region: tuple[int, int, int, int]) -> np.ndarray:
    # Levels differ in the high bits of the key, positions by SplitMix64.
    first, second = ((key + (level + 1) * 0xD1B54A32D192ED03) % 2**64 for key in keys)
    values = normals(first, *region)
    if symmetry < 1:
        values *= np.float32(symmetry)
        values += np.float32(np.sqrt(1 - symmetry * symmetry)) * normals(second, *region)
    return values


def _refine(
    coarse: np.ndarray, have: tuple[int, int, int, int], want: tuple[int, int, int, int], axis: int
) -> np.ndarray:
    """The same spline at half the period along an axis: 2i from (1, 6, 1) / 8 and 2i + 1 from (4, 4) / 8."""
    start, (first, last) = have[2 * axis], want[2 * axis : 2 * axis + 2]
    coarse = coarse if axis == 0 else coarse.T
    fine = np.empty((last - first, coarse.shape[1]), np.float32)
    for odd in (0, 1):
        # Positions of this parity are 2i + odd for i from `low` to `high`, end excluded.
        low, high = (first - odd + 1) // 2, (last - odd + 1) // 2
        middle, after = coarse[low - start : high - start], coarse[low - start + 1 : high - start + 1]
        target = fine[2 * low + odd - first :: 2][: high - low]
        if odd:
            np.add(middle, after, out=target)
            target *= np.float32(0.5)
        else:
            np.multiply(middle, np.float32(6), out=target)
            target += coarse[low - start - 1 : high - start - 1]
            target += after
            target *= np.float32(0.125)
    return fine if axis == 0 else fine.T


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
    image[_slices(shared, region)] += shape.draw(dy, dx)


def _slices(box: Box, region: Box) -> tuple[slice, slice]:
    """The rows and columns of a box in the pixels of a region that contains it."""
    return slice(box[0] - region[0], box[1] - region[0]), slice(box[2] - region[2], box[3] - region[2])


LESIONS = ("cluster", "mass", "asymmetry")
Kind = Literal["cluster", "mass", "asymmetry"]
Seed = int | tuple[int, ...]

FULL = 4095  # 12 bits
_TISSUE, _TEXTURE, _NOISE = 1300.0, 220.0, 10.0  # grey levels: mean of tissue, std of texture and of quantum noise
_SPECK = (600.0, 1100.0)  # grey levels of a speck above the tissue
_ALIKE = 0.8  # correlation of the textures of two slices
_BLUR = 2.5  # pixels: standard deviation of the blur of specks in images without a cluster


@dataclass(frozen=True)
class Lesion:
    """A lesion, in pixels of the image with its chest wall on the left."""

    kind: Kind
    box: Box
    shapes: tuple[Shape, ...] = ()
    """The shapes that are added to the tissue; empty for a cluster."""
    outline: tuple[Ellipse, ...] = ()
    """Ellipses whose union is the mask."""


class PhantomImage:
    """A phantom mammogram with its chest wall on the left, as from `open_pixels`; only seeds are in memory.

    A breast on black background has tissue with the power-law texture of real breasts, up to two soft masses and some
    lines, which are normal, and lesions. An image without a cluster of micro-calcifications (specks of 1 to 3 pixels)
    has the same cluster *blurred* over about 8 pixels, at the same position and with the same total brightness.

    Args:
        height, width: in pixels, at least 128 x 96, without an upper limit.
        seed: of the anatomy that both breasts of a patient share: outline, masses, lines and, to the degree of
            `symmetry` (0 to 1, the correlation of the two), texture.
        side: the seed of the rest: texture of this breast only, noise and lesions; by default `seed`.
        view: "CC", or "MLO" with a pectoral muscle in the upper corner at the chest wall.
        lesions: their kinds, each at most once.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        seed: Seed,
        side: Seed | None = None,
        view: str = "CC",
        lesions: Sequence[Kind] = (),
        symmetry: float = 1.0,
    ) -> None:
        if height < 128 or width < 96:
            raise DataError(f"a phantom of {height} x {width} is too small for lesions; use 128 x 96 or more")
        if view not in ("CC", "MLO") or not 0 <= symmetry <= 1 or not set(lesions) <= set(LESIONS):
            raise DataError(f"phantoms have views CC and MLO, symmetry 0 to 1 and lesions {', '.join(LESIONS)}")
        if len(set(lesions)) < len(lesions):
            raise DataError("a phantom has at most one lesion of a kind")
        self.shape = (height, width)
        self.symmetry = symmetry
        own = seed if side is None else side
        self._keys = _key(seed, 0), _key(own, 1)
        self._noise_key = _key(own, 2)
        rng = np.random.default_rng(seed)
        self._centre = height * rng.uniform(0.45, 0.55)
        self._semi = height * rng.uniform(0.38, 0.46), width * rng.uniform(0.6, 0.9)
        # Wavelengths up to a quarter of the image; a longer one would be a single slope across the breast.
        self._longest = 2 ** max(0, math.floor(math.log2(min(height, width) / 8)))
        self._muscle = (height * rng.uniform(0.4, 0.6), width * rng.uniform(0.3, 0.45)) if view == "MLO" else None
        self._shapes = self._normal_shapes(rng)
        rng = np.random.default_rng([*np.atleast_1d(own), 3])
        # The cluster is drawn first, so that a seed gives the same breast with and without it.
        self._specks, cluster = self._cluster(rng, sharp="cluster" in lesions)
        self.lesions: tuple[Lesion, ...] = tuple(
            cluster if kind == "cluster" else self._mass(rng) if kind == "mass" else self._asymmetry(rng)
            for kind in lesions
        )
        self._shapes += [shape for lesion in self.lesions for shape in lesion.shapes]
        self._boxes = [box_of(shape, height, width) for shape in self._shapes]
        self.depth = float(np.random.default_rng([*np.atleast_1d(own), 6]).uniform(0.15, 0.85))

    def at_slice(self, number: int, count: int) -> PhantomImage:
        """A slice of the volume with this anatomy: texture and noise are its own, lesions are in a few slices only.

        Lesions, and what replaces them, have the height exp(-d^2 / 2) at a distance of d times a 24th of the slices.

        Args:
            number: of the slice, from 0.
            count: of the slices.
        """
        distance = (number + 0.5 - self.depth * count) / max(1.0, count / 24)
        share = math.exp(-distance * distance / 2)
        made = copy.copy(self)
        made._keys = self._keys[0], _key((self._keys[1], number), 4)
        made._noise_key = _key((self._noise_key, number), 5)
        made.symmetry = self.symmetry * _ALIKE
        of_lesions = sum(len(lesion.shapes) for lesion in self.lesions)
        normal = len(self._shapes) - of_lesions
        made._shapes = [*self._shapes[:normal], *(replace(s, height=s.height * share) for s in self._shapes[normal:])]
        box, specks = self._specks
        made._specks = box, specks * np.float32(share)
        return made

    @property
    def normal_masses(self) -> tuple[Box, ...]:
        """Soft masses, which are normal anatomy."""
        return tuple(self._boxes[: self._normal])

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """uint16 (bottom - top, right - left), 12 bit, background 0; pixels do not depend on the region."""
        region = top, bottom, left, right
        depth = self._depth(region)
        if not (depth > 0).any():
            return np.zeros(depth.shape, np.uint16)
        image = power_law(self._keys, self.symmetry, self._longest, region)
        image *= np.float32(_TEXTURE)
        image += np.float32(_TISSUE)
        if self._muscle is not None:
            y = np.arange(top, bottom, dtype=np.float32)[:, None] / np.float32(self._muscle[0])
            x = np.arange(left, right, dtype=np.float32)[None, :] / np.float32(self._muscle[1])
            image += np.float32(350) * np.clip((np.float32(1) - y - x) * np.float32(15), 0, 1)
        for shape, box in zip(self._shapes, self._boxes, strict=True):
            add(shape, image, region, box)
        box, specks = self._specks
        shared = overlap(region, box)
        if shared is not None:
            image[_slices(shared, region)] += specks[_slices(shared, box)]
        # Compressed tissue has constant thickness, except for a seam along the skin.
        image *= np.sqrt(np.clip(depth / np.float32(0.06 * self.shape[1]), 0, 1))
        noise = normals(self._noise_key, *region)
        noise *= np.float32(_NOISE)
        image += noise
        np.clip(image, 40, FULL, out=image)
        image[depth <= 0] = 0
        return np.rint(image).astype(np.uint16)

    def mask(self, lesion: Lesion, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """uint8 (bottom - top, right - left): 255 inside the lesion, 0 outside."""
        region = top, bottom, left, right
        inside = np.zeros((bottom - top, right - left), np.float32)
        for ellipse in lesion.outline:
            add(ellipse, inside, region, box_of(ellipse, *self.shape))
        return np.where(inside > 0, np.uint8(255), np.uint8(0))

    def _depth(self, region: Box) -> np.ndarray:
        """The depth inside the outline, a half ellipse at the left border, in float32 pixels; 0 or less outside."""
        y = (np.arange(region[0], region[1], dtype=np.float32) - np.float32(self._centre)) / np.float32(self._semi[0])
        x = np.arange(region[2], region[3], dtype=np.float32) / np.float32(self._semi[1])
        return (np.float32(1) - np.sqrt((y * y)[:, None] + (x * x)[None, :])) * np.float32(min(self._semi))

    def _normal_shapes(self, rng: np.random.Generator) -> list[Shape]:
        width = self.shape[1]
        shapes: list[Shape] = []
        for _ in range(int(rng.integers(0, 3))):
            sigma = width * rng.uniform(0.02, 0.05)
            y, x = self._random_point(rng, 2 * sigma)
            reach = math.sqrt(8) * sigma
            shapes.append(Ellipse(y, x, reach, reach, 0, rng.uniform(200, 450), 4))
        self._normal = len(shapes)
        for _ in range(int(rng.integers(2, 6))):
            length = width * rng.uniform(0.1, 0.3)
            y, x = self._random_point(rng, length / 4)
            shapes.append(Line(y, x, length, rng.uniform(2, 5), rng.uniform(0, math.pi), rng.uniform(80, 200)))
        return shapes

    def _random_point(self, rng: np.random.Generator, margin: float) -> tuple[int, int]:
        """A random point at least `margin` pixels inside the outline and the image, or else the deepest point."""
        height, width = self.shape
        for _ in range(200):
            y, x = int(rng.integers(height)), int(rng.integers(width))
            depth = (1 - math.hypot((y - self._centre) / self._semi[0], x / self._semi[1])) * min(self._semi)
            if depth > margin and margin <= x and margin <= y < height - margin:
                return y, x
        return round(self._centre), int(margin)

    def _cluster(self, rng: np.random.Generator, *, sharp: bool) -> tuple[tuple[Box, np.ndarray], Lesion]:
        """8 to 20 specks of 1 to 3 pixels within about 5 mm, or the same specks blurred with the same sum: their box,
        pixels that are added to the tissue, and the lesion."""
        radius = int(rng.integers(18, 30))
        pad = math.ceil(3 * _BLUR)
        y, x = self._random_point(rng, radius + pad + 4.0)
        side = 2 * (radius + pad) + 4
        patch = np.zeros((side, side), np.float32)
        for _ in range(int(rng.integers(8, 21))):
            angle, distance = rng.uniform(0, 2 * math.pi), radius * math.sqrt(rng.uniform())
            top = round(radius + pad + distance * math.sin(angle))
            left = round(radius + pad + distance * math.cos(angle))
            rows, columns = int(rng.integers(1, 4)), int(rng.integers(1, 4))
            if rows * columns == 9:  # the largest specks are round
                patch[top : top + 3, left + 1] += rng.uniform(*_SPECK)
                columns, rows, top = 3, 1, top + 1
            patch[top : top + rows, left : left + columns] += rng.uniform(*_SPECK)
        if not sharp:
            steps = np.arange(side)
            kernel = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / _BLUR) ** 2).astype(np.float32)
            kernel /= kernel.sum(0, keepdims=True)  # the blur preserves the sum
            patch = kernel @ patch @ kernel.T
        top, left = y - side // 2, x - side // 2
        height, width = self.shape
        box = max(top, 0), min(top + side, height), max(left, 0), min(left + side, width)
        pixels = patch[box[0] - top : box[1] - top, box[2] - left : box[3] - left]
        disc = Ellipse(y, x, radius + 4.0, radius + 4.0, 0, 1, 1)
        return (box, pixels), Lesion("cluster", box, (), (disc,))

    def _mass(self, rng: np.random.Generator) -> Lesion:
        """A dense mass of three to five lobes with a steep edge, and spicules."""
        size = self.shape[1] * rng.uniform(0.03, 0.06)
        y, x = self._random_point(rng, 2 * size)
        lobes = []
        for _ in range(int(rng.integers(3, 6))):
            angle, shift = rng.uniform(0, 2 * math.pi), size * rng.uniform(0.1, 0.5)
            semi = size * rng.uniform(0.5, 0.8), size * rng.uniform(0.5, 0.8)
            centre = y + shift * math.sin(angle), x + shift * math.cos(angle)
            lobes.append(Ellipse(*centre, *semi, rng.uniform(0, math.pi), rng.uniform(200, 350), 1))
        spicules = []
        for _ in range(int(rng.integers(6, 13))):
            angle, length = rng.uniform(0, 2 * math.pi), size * rng.uniform(0.8, 1.4)
            centre = y + 0.9 * size * math.sin(angle), x + 0.9 * size * math.cos(angle)
            sigma = max(1.0, 0.04 * size)
            spicules.append(Line(*centre, length, sigma, angle, rng.uniform(150, 300)))
        return Lesion("mass", self._bounding_box(lobes), (*lobes, *spicules), tuple(lobes))

    def _asymmetry(self, rng: np.random.Generator) -> Lesion:
        """A large ill-defined density without a counterpart in the other breast."""
        semi = self.shape[1] * rng.uniform(0.1, 0.16), self.shape[1] * rng.uniform(0.08, 0.12)
        y, x = self._random_point(rng, 0.8 * max(semi))
        density = Ellipse(y, x, *semi, rng.uniform(0, math.pi), rng.uniform(350, 500), 2)
        return Lesion("asymmetry", self._bounding_box([density]), (density,), (density,))

    def _bounding_box(self, shapes: Sequence[Shape]) -> Box:
        boxes = [box_of(shape, *self.shape) for shape in shapes]
        tops, bottoms, lefts, rights = zip(*boxes, strict=True)
        return min(tops), max(bottoms), min(lefts), max(rights)


def _key(seed: Seed, purpose: int) -> int:
    return int(
        np.random.SeedSequence([*(int(part) for part in np.atleast_1d(seed)), purpose]).generate_state(1, np.uint64)[0]
    )
