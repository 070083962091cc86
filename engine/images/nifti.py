"""NIfTI volumes, read by region: slices (z), rows (y) and columns (x) as stored; nibabel reads the header."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from . import codecs
from .rawfile import RawPixels, library_errors
from .volumes import file_for_slices

_MARKS = (b"n+1\0", 344), (b"n+2\0", 4)
_GZIP = b"\x1f\x8b"
_PIECE = 2**20


def is_nifti(path: Path, head: bytes) -> bool:
    """Whether a file, which begins with `head`, is a NIfTI volume in one file, maybe compressed by gzip."""
    if head.startswith(_GZIP):
        try:
            with path.open("rb") as file, gzip.GzipFile(fileobj=file) as unpacked:
                head = unpacked.read(352)
        except (OSError, EOFError):
            return False
    return any(head[at:].startswith(mark) for mark, at in _MARKS)


class NiftiPixels(RawPixels):
    """Stored pixels of a NIfTI volume, (1, slices, height, width); scaled values are float32.

    A compressed file is unpacked once, into a temporary file.
    """

    def __init__(self, path: Path, head: bytes) -> None:
        try:
            import nibabel
        except ImportError:
            raise DataError(f"{path}: is a NIfTI volume; install nibabel to read it: pip install nibabel") from None
        packed = head.startswith(_GZIP)
        with library_errors(f"{path}: damaged NIfTI file", "fetch it again"), path.open("rb") as file:
            content: Any = gzip.GzipFile(fileobj=file) if packed else file
            begin = content.read(4)
            content.seek(0)
            of_two = int.from_bytes(begin, "little") == 540 or int.from_bytes(begin, "big") == 540
            kind: Any = nibabel.Nifti2Header if of_two else nibabel.Nifti1Header  # pyright: ignore
            header = kind.from_fileobj(content)
            shape, dtype = tuple(int(side) for side in header.get_data_shape()), header.get_data_dtype()
            offset, (slope, inter) = int(header.get_data_offset()), header.get_slope_inter()
            self.spacing = float(header.get_zooms()[2]) if len(shape) > 2 else None
            while len(shape) > 3 and shape[-1] == 1:
                shape = shape[:-1]
            if len(shape) != 3 or min(shape) < 1:
                raise DataError(f"{path}: has the shape {shape}, not (x, y, z); save one volume")
            self._file = _unpacked(content, offset, math.prod(shape) * dtype.itemsize, path) if packed else None
        super().__init__(
            Path(self._file.name) if self._file is not None else path,
            0 if packed else offset,
            (1, *shape[::-1]),
            dtype,
            order=(0, 1, 2, 3),
        )
        self.path, self.name = path, str(path)
        self._head = head
        self._scale = None if (slope, inter) in ((1.0, 0.0), (None, None)) else (float(slope), float(inter or 0))
        if self._scale is not None:
            self.full = 1.0
        apart = "" if self.spacing is None else f", {self.spacing:g} mm apart"
        scaled = "" if self._scale is None else f", times {self._scale[0]:g} plus {self._scale[1]:g}"
        self.steps = (f"NIfTI, {shape[2]} slices{apart}, {dtype.newbyteorder('=')}{scaled}",)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._head)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        values = super().read(top, bottom, left, right)
        if self._scale is None:
            return values
        slope, inter = self._scale
        return (values * slope + inter).astype(np.float32)


def _unpacked(content: Any, offset: int, count: int, path: Path) -> Any:
    """A temporary file with the `count` bytes from `offset` on."""
    codecs.check_size(count, path.stat().st_size, str(path))
    file = file_for_slices(count, str(path))
    content.seek(offset)
    while count:
        piece = content.read(min(count, _PIECE))
        if not piece:
            raise DataError(f"{path}: is truncated ({count} bytes are missing); fetch the file again")
        file.write(piece)
        count -= len(piece)
    file.flush()
    return file
