"""Uncompressed pixels in a file, read by region: `.npy`, PGM, and uncompressed TIFF and DICOM.

Rows are read with plain file reads, not through a memory map. Touched pages of a map count as resident memory, so a
scan over a map makes the whole image resident, and a file that shrinks under a map kills the process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError
from .stored import StoredPixels, channels_first, full_range, slices_first

_LONGEST = 160
_log = logging.getLogger("gigamorph")


@contextlib.contextmanager
def library_errors(what: str, remedy: str) -> Iterator[None]:
    """Context that turns a library's error into a `DataError`; damaged files raise errors of all kinds.

    Args:
        what: the file, and what is wrong with it.
        remedy: the end of the message.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} ({one_line(error)}); {remedy}") from error


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """Context that turns an error of the file system into a `DataError` that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning once per process, because a file is opened many times."""
    _log.warning("%s", text)


def one_line(error: Exception) -> str:
    """The message of a library's error in one line."""
    return brief(str(error)) or type(error).__name__


def brief(text: str) -> str:
    """The text in one line, truncated, because some libraries quote kilobytes of a damaged header."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


_READ_BYTES, _MAX_GAP = 1 << 20, 8  # bytes of one read of several runs; maximum step between runs, in run lengths


class FileBytes:
    """Byte ranges of a file; it is opened at the first read, thread-safe, and pickled as its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on; `DataError` if the file is too short."""
        done = 0
        with reading(self.path), self._lock:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
            self._file.seek(offset)
            while done < len(target):
                # A call may return fewer bytes than requested (at most 2 GiB on Linux).
                count = self._file.readinto(target[done:])  # pyright: ignore[reportAttributeAccessIssue]
                if not count:
                    break
                done += count
        if done < len(target):
            raise DataError(f"{self.path}: is truncated ({offset + len(target)} bytes expected); fetch the file again")

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on."""
        data = bytearray(count)
        self.read_into(offset, memoryview(data))
        return bytes(data)


class RawPixels(StoredPixels):
    """A C-ordered array at a byte offset of a file, as stored pixels (`stored.StoredPixels`).

    Args:
        path: the file.
        offset: the position of the first byte.
        shape: the shape of the array in the file.
        dtype: of the array.
        order: the permutation to (height, width), after channels and slices if there are any; by default that of
            `channels_first`.
        full: the value of white; by default that of the dtype.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        order: tuple[int, ...] | None = None,
        full: float | None = None,
    ) -> None:
        self.name = str(path)
        if dtype.kind not in "buif":
            raise DataError(f"{path}: contains {dtype}, but pixels must be numbers; save it as integers or floats")
        self.order = channels_first(shape, self.name) if order is None else order
        self.full = full_range(dtype) if full is None else full
        self.offset, self.stored_shape, self.dtype = offset, tuple(int(side) for side in shape), dtype
        sides = [self.stored_shape[axis] for axis in self.order]
        self.shape = (1, *sides) if len(sides) == 2 else tuple(sides)
        self.steps = (f"array, {dtype.newbyteorder('=')}",)
        self._bytes = FileBytes(path)
        needed = offset + math.prod(self.stored_shape) * dtype.itemsize
        if path.stat().st_size < needed:
            raise DataError(f"{path}: is truncated ({path.stat().st_size} of {needed} bytes); fetch the file again")

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        wanted = [*((0, side) for side in self.shape[:-2]), (top, bottom), (left, right)][-len(self.order) :]
        ranges = [wanted[self.order.index(axis)] for axis in range(len(self.order))]
        box = self._read_box(ranges).transpose(self.order)
        return box if box.ndim >= 3 else box[None]

    def close(self) -> None:
        self._bytes.close()

    def _read_box(self, ranges: list[tuple[int, int]]) -> np.ndarray:
        """A box of the stored array, with one file read per contiguous run.

        If the gaps between runs are small, several runs are read at once together with the gaps.
        """
        out = np.empty([stop - start for start, stop in ranges], self.dtype)
        if not out.size:
            return out
        shape = self.stored_shape
        # A run covers the last axes that are read completely, and the axis before them.
        run = len(shape) - 1
        while run > 0 and ranges[run] == (0, shape[run]):
            run -= 1
        strides = [math.prod(shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(shape))]
        length = math.prod(out.shape[run:]) * self.dtype.itemsize
        target = out.reshape(-1).view(np.uint8).reshape(-1, length)
        step = strides[run - 1] if run else length
        together = max(1, _READ_BYTES // step) if step <= _MAX_GAP * length else 1
        count = out.shape[run - 1] if run else 1  # the number of runs at a distance of `step`
        done = 0
        for index in itertools.product(*(range(*pair) for pair in ranges[: max(0, run - 1)])):
            corner = (*index, *(start for start, _ in ranges[len(index) : run + 1]))
            offset = self.offset + sum(i * stride for i, stride in zip(corner, strides, strict=False))
            for first in range(0, count, together):
                rows = min(together, count - first)
                if rows == 1:
                    self._bytes.read_into(offset + first * step, target[done].data)
                else:
                    span = np.empty((rows, step), np.uint8)
                    needed = (rows - 1) * step + length
                    self._bytes.read_into(offset + first * step, span.reshape(-1).data[:needed])
                    target[done : done + rows] = span[:, :length]
                done += rows
        return out


def open_npy(path: Path, volume: bool = False) -> RawPixels:
    """The array in a `.npy` file, an image or a volume in C or Fortran order; never read whole."""
    with library_errors(f"{path}: damaged .npy header", "save it again"), path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        # numpy would allocate any length that the header claims; shape and dtype need about a hundred bytes.
        width = 2 if version == (1, 0) else 4
        claimed = int.from_bytes(file.read(width), "little")
        if claimed > min(path.stat().st_size, 2**20):
            raise ValueError(f"a header of {claimed} bytes")
        file.seek(-width, 1)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
        offset = file.tell()
    order, last = (slices_first if volume else channels_first)(shape, str(path)), len(shape) - 1
    if fortran:
        order, shape = tuple(last - axis for axis in order), shape[::-1]
    if volume and last == 2:
        order, shape = (0, *(axis + 1 for axis in order)), (1, *shape)
    return RawPixels(path, offset, shape, dtype, order=order)


def open_pgm(path: Path) -> RawPixels:
    """A binary PGM file (P5), 8 or 16 bit; never read whole."""
    with path.open("rb") as file:
        head = re.match(rb"P5" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s", file.read(2**12))
    if head is None:
        raise DataError(f"{path}: damaged PGM header; fetch the file again")
    width, height, white = (int(number) for number in head.groups())
    if not width or not height or not 0 < white < 2**16:
        raise DataError(f"{path}: damaged PGM header ({width} x {height}, white {white}); fetch the file again")
    dtype = np.dtype(np.uint8 if white < 256 else ">u2")
    return RawPixels(path, head.end(), (height, width), dtype, order=(0, 1), full=float(white))
