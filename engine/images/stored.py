"""Stored values of files and arrays: the base class of their readers, the meaning of their dtype, arrays in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .affine import Affine


class StoredPixels:
    """A reader of a file format for `ImageSource`, which returns stored values of a region; a base class."""

    shape: tuple[int, ...]
    """(channels, height, width); of a volume, (channels, slices, height, width)."""
    name: str
    """The file."""
    dtype: Any
    """The numpy or torch dtype of the stored values."""
    steps: tuple[str, ...]
    """The steps from the file to grey values, in order, without data that identify a patient."""
    full: float
    """The grey value of white: a stored value, or an entry of `table` if there is one."""
    table: np.ndarray | None = None
    """The grey value of each stored value, or None if stored values are grey values."""
    to_original = Affine()
    """The map from the stored image's coordinates to those of the file."""
    by_region = True
    """Whether a region is read alone; otherwise the first read decodes the whole image and stores it."""
    self_describing = False
    """Whether the file defines white and the side of the chest wall, as DICOM does."""

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray | Tensor:
        """Stored values of a region, (channels, bottom - top, right - left); of a volume, with its slices."""
        raise NotImplementedError

    def close(self) -> None:
        """Close files and free decoded pixels; the next read opens or decodes them again."""

    def flips(self) -> tuple[bool, bool]:
        """(left-right, up-down): the mirroring to the canonical orientation, if the file defines it."""
        return False, False


def chosen_plane(frame: int | None, count: int, name: str, what: str, unit: str = "frame") -> int:
    """The index of one of `count` images in a file; `DataError` if it does not exist, or none of several is chosen.

    Args:
        frame: the index from 0, or None.
        count: the number of images.
        name: the file.
        what, unit: the names of several images and of one, for messages.
    """
    if frame is None and count > 1:
        ways = "--frame, frame= in Python, or column frame of a table"
        raise DataError(f"{name}: has {count} {what}; choose one from 0 to {count - 1} ({ways})")
    if frame is not None and not 0 <= frame < count:
        raise DataError(f"{name}: {unit} {frame} does not exist; the file has 0 to {count - 1}")
    return frame or 0


def integer_dtype(dtype: np.dtype | torch.dtype) -> np.dtype | None:
    """uint8 or uint16 in native byte order; None for other dtypes."""
    name = str(dtype).removeprefix("torch.")
    name = name if isinstance(dtype, torch.dtype) else np.dtype(dtype).newbyteorder("=").name
    return np.dtype(name) if name in ("uint8", "uint16") else None


def is_wide(dtype: np.dtype | torch.dtype) -> bool:
    """Whether these are integers of more than 16 bits, whose range does not define white: detectors have fewer bits."""
    kind = "f" if isinstance(dtype, torch.dtype) and dtype.is_floating_point else getattr(dtype, "kind", "i")
    return kind in "iu" and dtype.itemsize > 2


def full_range(dtype: np.dtype | torch.dtype) -> float:
    """The value of white: 1 for floats and booleans, the largest value for integers.

    For more than 16 bits it is only an upper limit: `ImageSource` determines the white of such an image.
    """
    if isinstance(dtype, torch.dtype):
        return 1.0 if dtype.is_floating_point or dtype == torch.bool else float(torch.iinfo(dtype).max)
    return float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0


class ArrayPixels(StoredPixels):
    """Stored pixels in memory: a numpy array or tensor in (channels, height, width) order."""

    def __init__(self, values: np.ndarray | Tensor, name: str) -> None:
        self.values, self.dtype = values, values.dtype
        self.steps = (f"array in memory, {str(values.dtype).removeprefix('torch.')}",)
        self.name = name
        self.full = full_range(values.dtype)
        self.shape = tuple(int(side) for side in values.shape)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray | Tensor:
        return self.values[..., top:bottom, left:right]


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


def slices_first(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The permutation from this shape to (channels, slices, height, width), without channels for three axes.

    Raises:
        DataError: if there is none.
    """
    if len(shape) == 3 and all(shape):
        return (0, 1, 2)
    if len(shape) == 4 and all(shape):
        if shape[0] in (1, 3):
            return (0, 1, 2, 3)
        if shape[3] in (1, 3):
            return (3, 0, 1, 2)
    raise DataError(f"{name}: shape {shape} must be (D, H, W), (C, D, H, W) or (D, H, W, C) with 1 or 3 channels")
