"""What a reader of a file format offers: the values that the file stores, and what their dtype means."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .affine import Affine


class StoredPixels(Protocol):
    """What a file format must offer to become a `PixelSource`: stored values of a region, in their own dtype."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        ...

    @property
    def name(self) -> str:
        """The file."""
        ...

    @property
    def dtype(self) -> np.dtype | torch.dtype:
        """Of the stored values."""
        ...

    @property
    def steps(self) -> tuple[str, ...]:
        """What leads from the file to grey values, in order; nothing that identifies a patient."""
        ...

    @property
    def to_original(self) -> Affine:
        """From the stored image's coordinates to those of the file."""
        ...

    @property
    def full(self) -> float:
        """The grey value that means white: a stored value, or an entry of `table` where there is one."""
        ...

    @property
    def table(self) -> np.ndarray | None:
        """Grey value of every stored value (indexed by it), or None where stored values are grey values."""
        ...

    @property
    def self_describing(self) -> bool:
        """Whether the file itself says where white and the chest wall are, as DICOM does."""
        ...

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray | Tensor:
        """(channels, bottom - top, right - left) stored values."""
        ...

    def flips(self) -> tuple[bool, bool]:
        """(left-right, up-down): the mirroring that brings the image to its canonical orientation, if the file says."""
        ...


def integer_dtype(dtype: np.dtype | torch.dtype) -> np.dtype | None:
    """uint8 or uint16 in the byte order of this machine, if that is what is stored."""
    name = str(dtype).removeprefix("torch.")
    name = name if isinstance(dtype, torch.dtype) else np.dtype(dtype).newbyteorder("=").name
    return np.dtype(name) if name in ("uint8", "uint16") else None


def is_wide(dtype: np.dtype | torch.dtype) -> bool:
    """Whether these are integers of more than 16 bits: no detector has as many, so their type does not say white."""
    kind = "f" if isinstance(dtype, torch.dtype) and dtype.is_floating_point else getattr(dtype, "kind", "i")
    return kind in "iu" and dtype.itemsize > 2


def full_range(dtype: np.dtype | torch.dtype) -> float:
    """The value that means white: 1 for floats and booleans, the largest value of integers.

    Of more than 16 bits that is only an upper limit: `ImageSource` looks for the white of such an image.
    """
    if isinstance(dtype, torch.dtype):
        return 1.0 if dtype.is_floating_point or dtype == torch.bool else float(torch.iinfo(dtype).max)
    return float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0
