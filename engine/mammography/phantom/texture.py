"""Random fields whose values are functions of a position and a key, so that each region is computed independently.

They use additions, multiplications, divisions and square roots of whole arrays only, which IEEE 754 rounds correctly:
a pixel has the same bits in each region that contains it.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
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
    keys = _mix(np.uint64(key) + (rows + np.uint64(1)) * _GOLDEN)
    parts = _mix(keys[:, None] + columns * _GOLDEN).view(np.uint16).reshape(len(rows), len(columns), 4)
    total = parts[..., 0].astype(np.float32)
    for part in range(1, 4):
        total += parts[..., part]
    total -= np.float32(_MEAN)
    total *= np.float32(1 / _STD)
    return total


def _mix(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64; integer overflow is intended."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


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
