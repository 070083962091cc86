"""What files other than DICOM do not say: which value is white, and on which side the chest wall is.

Detectors have 10, 12 or 14 bits, and PNG and TIFF files hold their values in 16: read on the file's own scale, 12 bits
in 16 are an almost black image.
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
"""The stored value that is white, or the least of `WHITES` that no pixel exceeds."""
WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
DARK = 1 / 16
"""An image that uses no more of its scale is taken to be on another scale: 12 bits in 16 use a sixteenth."""
_ROWS, _STRIPS = 16, 64
# How much brighter the half with the breast must be before its side counts as seen.
_CLEAR = 1.3


def parse_white(text: str) -> White:
    """``auto`` or a positive number; `DataError` if it is neither."""
    if text.strip().lower() == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < np.inf:
        raise DataError(f"white level {text!r} is neither auto nor a positive number; 12 bits have 4095")
    return value


def require_white(white: White | None) -> None:
    """`DataError` unless it is a white level, or None for the file's own."""
    if white not in (None, "auto") and not (isinstance(white, Real) and 0 < white < np.inf):
        raise DataError(f"white={white!r} is neither 'auto' nor a positive number; 12 bits have 4095")


def require_side(laterality: str | None) -> None:
    """`DataError` unless it is the side of a breast, or None where there is none."""
    if laterality not in (None, "L", "R"):
        raise DataError(f"laterality={laterality!r} is neither 'L' nor 'R'")


def find_white(stored: StoredPixels) -> float:
    """The least of `WHITES` that no pixel exceeds, but no more than the file's own white; reads the whole image.

    Of integers of more than 16 bits that exceed all of them, the largest pixel.
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
    """The largest stored value of an image; reads all of it, some rows at a time."""
    _, height, width = stored.shape
    return max(highest(stored.read(top, min(top + 256, height), 0, width)) for top in range(0, height, 256))


def highest(values: np.ndarray | Tensor) -> float:
    """The largest of some values, whatever their type (PyTorch has no maximum of uint16)."""
    return float(values.max()) if isinstance(values, np.ndarray) else float(values.to(float32).max())


def sample_rows(height: int) -> Iterator[tuple[int, int]]:
    """(top, bottom) of strips that are spread evenly: all rows of small images, a thousand of large ones."""
    count = min(_STRIPS, -(-height // _ROWS))
    for number in range(count):
        top = number * height // count
        yield top, min(top + _ROWS, (number + 1) * height // count)


def require_numbers(strip: Tensor, where: str = "") -> None:
    """Refuse pixels that are NaN or infinite, which files of floating point may hold.

    Raises:
        DataError: that begins with ``where``.
    """
    if not strip.isfinite().all():
        raise DataError(f"{where}holds pixels that are no numbers (NaN or infinite); save it without them")


def brighter_half(columns: np.ndarray) -> Literal["left", "right"] | None:
    """The half that holds more above the darkest column, if it is clear.

    columns: (width,), grey of each column, of any scale.
    """
    weight = columns - columns.min()
    half = len(weight) // 2
    left, right = weight[:half].sum(), weight[len(weight) - half :].sum()
    if max(left, right) < _CLEAR * min(left, right) or left == right:
        return None
    return "left" if left > right else "right"
