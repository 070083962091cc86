"""White level and side of the chest wall for files other than DICOM, which do not store them.

Detectors have 10, 12 or 14 bits, and PNG and TIFF files store their values in 16. Scaled by the file's range, 12 bits
in 16 give an almost black image.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Literal

import numpy as np
from torch import Tensor, float32

from ..errors import DataError
from .stored import StoredPixels, is_wide

White = float | Literal["auto"]
"""The stored value of white; "auto" is the smallest of `WHITES` that no pixel exceeds."""
WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
DARK = 1 / 16
"""An image that uses at most this share of its scale is probably on another scale: 12 bits in 16 use a sixteenth."""
_ROWS, _STRIPS = 16, 64
# The side of the breast is clear if its half is brighter by at least this factor.
_CLEAR = 1.3


def parse_white(text: str) -> White:
    """Parse ``auto`` or a positive number; `DataError` for other text."""
    if text.strip().lower() == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < np.inf:
        raise DataError(f"white level {text!r} must be auto or a positive number, such as 4095 for 12 bits")
    return value


def require_white(white: White | None) -> None:
    """Raise a `DataError` unless it is a white level, or None for that of the file."""
    if white not in (None, "auto") and not (isinstance(white, Real) and 0 < white < np.inf):
        raise DataError(f"white={white!r} must be 'auto' or a positive number, such as 4095 for 12 bits")


def require_side(laterality: str | None) -> None:
    """Raise a `DataError` unless it is the side of a breast, or None without one."""
    if laterality not in (None, "L", "R"):
        raise DataError(f"laterality={laterality!r} must be 'L' or 'R'")


def find_white(stored: StoredPixels) -> float:
    """The smallest of `WHITES` that no pixel exceeds, at most the white of the file; reads the whole image.

    For integers of more than 16 bits that exceed all of `WHITES`, it is the largest pixel.
    """
    integer = np.dtype(str(stored.dtype).removeprefix("torch.")).kind in "ui"
    least = 255.0 if integer else 1.0
    if integer and stored.full <= least:
        return stored.full
    most = largest(stored)
    beyond = most if is_wide(stored.dtype) else stored.full
    found = next((white for white in WHITES if white >= max(most, least)), beyond)
    return min(found, stored.full) if integer else max(found, most)


def largest(stored: StoredPixels) -> float:
    """The largest stored value of an image; reads all of it, a few rows at a time."""
    height, width = stored.shape[-2:]
    return max(highest(stored.read(top, min(top + 256, height), 0, width)) for top in range(0, height, 256))


def highest(values: np.ndarray | Tensor) -> float:
    """The largest value, for all dtypes (PyTorch has no maximum of uint16)."""
    return float(values.max()) if isinstance(values, np.ndarray) else float(values.to(float32).max())


def sample_rows(height: int, slices: int = 1) -> Iterator[tuple[int, int]]:
    """(top, bottom) of evenly spaced strips: all rows of small images, about a thousand rows of all slices together."""
    count = min(max(1, _STRIPS // slices), -(-height // _ROWS))
    for number in range(count):
        top = number * height // count
        yield top, min(top + _ROWS, (number + 1) * height // count)


def require_numbers(strip: Tensor, where: str = "") -> None:
    """Raise an error for NaN or infinite pixels, which floating-point files may contain.

    Raises:
        DataError: begins with ``where``.
    """
    if not strip.isfinite().all():
        raise DataError(f"{where}contains NaN or infinite pixels; save it without them")


def brighter_half(columns: np.ndarray) -> Literal["left", "right"] | None:
    """The half of an image with the larger sum above the darkest column; None if unclear.

    Args:
        columns: the grey value of each column, (width,), on any scale.
    """
    weight = columns - columns.min()
    half = len(weight) // 2
    left, right = weight[:half].sum(), weight[len(weight) - half :].sum()
    if max(left, right) < _CLEAR * min(left, right) or left == right:
        return None
    return "left" if left > right else "right"
