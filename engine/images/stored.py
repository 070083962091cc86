"""The interface of readers of file formats: stored values, and the meaning of their dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .affine import Affine


class StoredPixels:
    """A reader of a file format for `ImageSource`, which returns stored values of a region; a base class."""

    shape: tuple[int, int, int]
    """(channels, height, width)."""
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
    self_describing = False
    """Whether the file defines white and the side of the chest wall, as DICOM does."""

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray | Tensor:
        """Stored values of a region, (channels, bottom - top, right - left)."""
        raise NotImplementedError

    def flips(self) -> tuple[bool, bool]:
        """(left-right, up-down): the mirroring to the canonical orientation, if the file defines it."""
        return False, False


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
