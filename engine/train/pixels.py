"""Checks of the pixels of training images: NaN or infinite values, and constant images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..images.derived import stored_source
from ..images.levels import require_numbers
from ..images.pixels import PixelSource

_ROWS, _FIRST = 256, 16


def sources_of(item: Mapping[str, Any]) -> Sequence[PixelSource]:
    """The image of a data set's item, or all views of its exam."""
    return item.get("views") or [item["image"]]


def read_through(source: PixelSource, name: str) -> None:
    """Read a complete image as the network does.

    Raises:
        DataError: if it cannot be read, or has pixels that are NaN or infinite.
    """
    for top in range(0, source.shape[1], _ROWS):
        require_numbers(source.read(top, min(top + _ROWS, source.shape[1]), 0, source.shape[2]), f"{name}: ")


def is_blank(source: PixelSource) -> bool:
    """Whether each channel of the file is constant; for most images a few rows in the middle suffice."""
    found = stored_source(source)
    if found is None:
        return False
    stored = found.stored
    _, height, width = stored.shape
    value = None
    middle = height // 2
    for top, bottom in [(middle, min(middle + _FIRST, height)), *((t, t + _ROWS) for t in range(0, height, _ROWS))]:
        strip = np.asarray(stored.read(top, min(bottom, height), 0, width))
        value = strip[:, :1, :1] if value is None else value
        if (strip != value).any():
            return False
    return True
