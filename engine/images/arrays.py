"""Images in memory: arrays and tensors as stored pixels, and the order of their axes."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..errors import DataError
from .stored import StoredPixels, full_range


class ArrayPixels(StoredPixels):
    """Stored pixels in memory: a numpy array or tensor in (channels, height, width) order."""

    def __init__(self, values: np.ndarray | Tensor, name: str) -> None:
        self.values, self.dtype = values, values.dtype
        self.steps = (f"array in memory, {str(values.dtype).removeprefix('torch.')}",)
        self.name = name
        self.full = full_range(values.dtype)
        self.shape = (int(values.shape[0]), int(values.shape[1]), int(values.shape[2]))

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray | Tensor:
        return self.values[:, top:bottom, left:right]


def channels_first(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The permutation from this shape to (channels, height, width); `DataError` if there is none."""
    if len(shape) == 2 and all(shape):
        return (0, 1)
    if len(shape) == 3 and all(shape):
        if shape[0] in (1, 3):
            return (0, 1, 2)
        if shape[2] in (1, 3):
            return (2, 0, 1)
    raise DataError(f"{name}: shape {shape} must be (H, W), (C, H, W) or (H, W, C) with 1 or 3 channels")
