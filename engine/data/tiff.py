"""TIFF files read by region: only the tiles or strips that a region touches are decoded."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from ..errors import DataError
from .rawfile import FileBytes, RawPixels, one_line

# Decoded segments kept per file. A scan goes along a row of tiles and straddles segments at their borders; this holds
# the segments of one such row: 2048 rows of 32768 16-bit pixels.
CACHE_BYTES = 128 * 2**20

_MINISWHITE, _MINISBLACK, _RGB, _YCBCR = 0, 1, 2, 6


class TiffPixels:
    """Stored pixels (`pixels.StoredPixels`) of the first page of a TIFF or BigTIFF file; alpha is dropped."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, tuple[np.ndarray, tuple[int, ...]]] = OrderedDict()
        self._cached = 0
        try:
            with tifffile.TiffFile(path) as tif:
                self._page = tif.pages.first
                self._describe()
        except DataError:
            raise
        except Exception as error:  # tifffile lets errors of every kind out of a damaged directory
            raise DataError(f"{path}: damaged TIFF ({one_line(error)}); fetch the file again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def _describe(self) -> None:
        page = self._page
        sides = (page.imagelength, page.imagewidth, page.samplesperpixel, page.bitspersample)
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise DataError(f"{self.path}: damaged TIFF directory; fetch the file again")
        colour = page.photometric in (_RGB, _YCBCR)
        if not colour and page.photometric not in (_MINISWHITE, _MINISBLACK):
            raise DataError(f"{self.path}: photometric {page.photometric!r} is not supported; save it as grey or RGB")
        if page.dtype is None or page.dtype.kind not in "buif" or page.imagedepth != 1 or page.is_subsampled:
            raise DataError(f"{self.path}: holds {page.dtype}, depth {page.imagedepth}; save it as grey or RGB")
        channels = 3 if colour else 1
        if page.samplesperpixel < channels:
            raise DataError(f"{self.path}: has {page.samplesperpixel} samples, {channels} expected; save it again")
        self.shape = (channels, page.imagelength, page.imagewidth)
        self.full = float(2**page.bitspersample - 1) if page.dtype.kind == "u" else 1.0
        if page.dtype.kind == "i":
            self.full = float(np.iinfo(page.dtype).max)
        self.table = None
        inverted = page.photometric == _MINISWHITE
        if inverted:
            if page.dtype.kind not in "ub" or page.dtype.itemsize > 2:
                raise DataError(f"{self.path}: white-is-zero with {page.dtype}; save it with black as zero")
            self.table = np.arange(int(self.full), -1, -1, dtype=np.uint16)
        self._bytes = FileBytes(self.path)
        self._raw = None
        if page.is_contiguous and page.is_memmappable:
            planar = int(page.planarconfig) == 2 and page.samplesperpixel > 1
            stored = (page.samplesperpixel, *self.shape[1:]) if planar else (*self.shape[1:], page.samplesperpixel)
            dtype = page.dtype.newbyteorder(page.parent.byteorder)
            order = (0, 1, 2) if planar else (2, 0, 1)
            self._raw = RawPixels(self.path, page.dataoffsets[0], stored, dtype, order=order, full=self.full)
            return
        if math.prod(self._grid()[2:]) > len(page.dataoffsets):
            raise DataError(f"{self.path}: {len(page.dataoffsets)} segments are too few; fetch the file again")
        end = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
        size = self.path.stat().st_size
        if end > size:
            raise DataError(f"{self.path}: is truncated ({size} of {end} bytes); fetch the file again")
        _ = page.decode, page.jpegtables  # both need the open file once, and are kept

    def flips(self) -> tuple[bool, bool]:
        return False, False

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        if self._raw is not None:
            return self._raw.read(top, bottom, left, right)[: self.shape[0]]
        out = np.zeros((self.shape[0], bottom - top, right - left), self._page.dtype)
        if out.size:
            for index in self._touched(top, bottom, left, right):
                self._paste(index, out, top, left)
        return out

    def _grid(self) -> tuple[int, int, int, int, int]:
        """Rows and columns of a segment, and how many planes, segments down and segments across there are."""
        page = self._page
        if page.is_tiled:
            step_y, step_x = page.tilelength, page.tilewidth
        else:
            step_y, step_x = min(page.rowsperstrip, page.imagelength), page.imagewidth
        planes = self.shape[0] if int(page.planarconfig) == 2 else 1
        return step_y, step_x, planes, math.ceil(page.imagelength / step_y), math.ceil(page.imagewidth / step_x)

    def _touched(self, top: int, bottom: int, left: int, right: int) -> list[int]:
        """Numbers of the segments that hold a part of the region."""
        step_y, step_x, planes, down, across = self._grid()
        return [
            (plane * down + y) * across + x
            for plane in range(planes)
            for y in range(top // step_y, math.ceil(bottom / step_y))
            for x in range(left // step_x, math.ceil(right / step_x))
        ]

    def _paste(self, index: int, out: np.ndarray, top: int, left: int) -> None:
        segment, place = self._segment(index)
        plane, _, y, x = place[:4]
        channels, height, width = out.shape
        first_row, last_row = max(y, top), min(y + segment.shape[1], top + height)
        first, last = max(x, left), min(x + segment.shape[2], left + width)
        if first_row >= last_row or first >= last:
            return
        part = segment[0, first_row - y : last_row - y, first - x : last - x]
        goal = out[:, first_row - top : last_row - top, first - left : last - left]
        if int(self._page.planarconfig) == 2 and self._page.samplesperpixel > 1:
            goal[plane] = part[..., 0]
        else:
            goal[...] = part[..., :channels].transpose(2, 0, 1)

    def _segment(self, index: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """Decoded segment (depth, rows, columns, samples) and where it lies (plane, depth, row, column, sample)."""
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        page = self._page
        count = page.databytecounts[index]
        data = self._bytes.read(page.dataoffsets[index], count) if count else None
        try:
            decoded, place, shape = page.decode(data, index, jpegtables=page.jpegtables)
        except Exception as error:  # every codec has its own exceptions
            raise DataError(
                f"{self.path}: segment {index} is damaged ({one_line(error)}); fetch the file again"
            ) from error
        if decoded is None:  # a segment that was never written holds the fill value
            decoded = np.full(shape, page.nodata, page.dtype)
        if decoded.ndim != 4 or decoded.dtype != page.dtype or decoded.shape[3] != shape[3]:
            raise DataError(f"{self.path}: segment {index} decodes to another shape or type; fetch the file again")
        decoded = decoded[: shape[0], : shape[1], : shape[2]]
        with self._lock:
            if index not in self._cache:
                self._cache[index] = (decoded, place)
                self._cached += decoded.nbytes
            while self._cached > CACHE_BYTES and len(self._cache) > 1:
                _, (old, _) = self._cache.popitem(last=False)
                self._cached -= old.nbytes
        return decoded, place
