"""TIFF files (also OME-TIFF and SVS), read by region: only tiles or strips that overlap a region are decoded."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from ..errors import DataError
from . import codecs
from .rawfile import FileBytes, RawPixels, library_errors
from .stored import chosen_plane
from .tiles import TiledPixels, TileGrid

_MINISWHITE, _MINISBLACK, _RGB, _YCBCR = 0, 1, 2, 6
_ALPHA = {1, 2}  # ExtraSamples: associated, unassociated alpha; 0 is unspecified data
_JPEG, _JPEG_2000, _APERIO_YCBCR = {6, 7, 34892, 33007}, {33004, 33005, 34712}, 33003


def _only_alpha(page: tifffile.TiffPage, channels: int) -> bool:
    """Whether the samples of a pixel in addition to grey or colour are alpha, not further bands."""
    extra = page.samplesperpixel - channels
    if extra == 1 and not page.extrasamples:  # without a tag it is alpha, as in libtiff
        return True
    return sum(int(kind) in _ALPHA for kind in page.extrasamples) >= extra


class TiffPixels(TiledPixels):
    """Stored pixels (`stored.StoredPixels`) of a plane of a TIFF file, at full resolution; alpha is dropped.

    Args:
        path: the file.
        frame: the plane of the file's first image, from 0: a page, or a focal plane, time or channel of OME-TIFF;
            required if there are several. Thumbnails, labels and lower resolutions are other images and ignored.
    """

    def __init__(self, path: Path, frame: int | None = None) -> None:
        self.name = str(path)
        self.path = path
        self.frame = frame
        with (
            library_errors(f"{path}: damaged TIFF", "fetch the file again"),
            # Other files of a multi-file image are found for local files only.
            tifffile.TiffFile(path if isinstance(path, Path) else path.open("rb")) as tif,
        ):
            self._choose(tif, frame)
            self._describe()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.frame)

    def _choose(self, tif: tifffile.TiffFile, frame: int | None) -> None:
        if not tif.series:
            raise DataError(f"{self.path}: contains no image; fetch the file again")
        whole = (series for series in tif.series if not series.keyframe.is_reduced)  # a thumbnail may come first
        series = next(whole, tif.series[0]).levels[0]
        self.planes = len(series)
        chosen = chosen_plane(frame, self.planes, self.name, "planes")
        page = series.keyframe
        if series.dataoffset is not None:  # a contiguous block, perhaps with one directory for all planes
            offsets, counts = (series.dataoffset + chosen * page.nbytes,), (page.nbytes,)
        else:
            own = series[chosen]
            if own is None:
                raise DataError(f"{self.path}: plane {frame} is not in its folder; fetch all files into it")
            offsets, counts = own.dataoffsets, own.databytecounts
            page = own if isinstance(own, tifffile.TiffPage) else page
            self._bytes = FileBytes(self.path if own.parent is tif else self._other_file(own.parent))
        self._page, self._offsets, self._counts = page, self._integers(offsets), self._integers(counts)
        self._contiguous = series.dataoffset is not None or (page.is_contiguous and page.is_memmappable)
        if series.dataoffset is not None:
            self._bytes = FileBytes(self.path)

    def _other_file(self, other: tifffile.TiffFile) -> Path:
        """The file of an OME-TIFF plane in another file, which must be in the same folder or below."""
        found = Path(os.path.abspath(other.filehandle.path))
        if not found.is_relative_to(os.path.abspath(self.path.parent)):
            raise DataError(
                f"{self.path}: plane {self.frame} is not in its folder, but in {found}; move them into one folder"
            )
        return found

    def _integers(self, values: Any) -> np.ndarray:
        """A tag's offsets or lengths as int64; they may have any type in a damaged file."""
        array = np.asarray(values)
        # Numbers beyond 64 bits become floats, objects or, if unsigned, negative.
        if array.dtype.kind not in "iu" or not array.size or array.astype(np.int64).min() < 0:
            raise DataError(f"{self.path}: damaged TIFF directory; fetch the file again")
        return array.astype(np.int64)

    def _describe(self) -> None:
        page = self._page
        sides = (page.imagelength, page.imagewidth, page.samplesperpixel, page.bitspersample)
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise DataError(f"{self.path}: damaged TIFF directory; fetch the file again")
        colour = page.photometric in (_RGB, _YCBCR)
        if not colour and page.photometric not in (_MINISWHITE, _MINISBLACK):
            raise DataError(f"{self.path}: photometric {page.photometric!r} is not supported; save it as grey or RGB")
        decoded = page.compression in _JPEG and int(page.planarconfig) == 1  # by the JPEG decoder, to RGB
        if page.compression == _APERIO_YCBCR or (page.photometric == _YCBCR and not decoded):
            raise DataError(f"{self.path}: colour is stored as YCbCr; save it as RGB")
        if page.dtype is None or page.dtype.kind not in "buif" or page.imagedepth != 1:
            raise DataError(f"{self.path}: contains {page.dtype}, depth {page.imagedepth}; save it as grey or RGB")
        channels = 3 if colour else 1
        if page.samplesperpixel < channels:
            raise DataError(f"{self.path}: has {page.samplesperpixel} samples instead of {channels}; save it again")
        if not _only_alpha(page, channels):
            bands = f"{page.samplesperpixel} bands instead of {channels} and alpha"
            raise DataError(f"{self.path}: has {bands}; save it as grey or RGB")
        self.shape = (channels, page.imagelength, page.imagewidth)
        self.dtype = page.dtype
        self.full = float(2**page.bitspersample - 1) if page.dtype.kind == "u" else 1.0
        if page.dtype.kind == "i":
            self.full = float(np.iinfo(page.dtype).max)
        if page.photometric == _MINISWHITE:
            if page.dtype.kind not in "ub" or page.dtype.itemsize > 2:
                raise DataError(f"{self.path}: white-is-zero with {page.dtype}; save it with black as zero")
            self.table = np.arange(int(self.full), -1, -1, dtype=np.uint16)
        self._planar = int(page.planarconfig) == 2 and page.samplesperpixel > 1
        which = f", plane {self.frame} of {self.planes}" if self.planes > 1 and self.frame is not None else ""
        inverted = ("inverted, as WhiteIsZero says",) if page.photometric == _MINISWHITE else ()
        self.steps = (f"TIFF, {page.dtype}, {page.bitspersample} bits{which}", *inverted)
        self._raw = None
        if self._contiguous:
            stored = (
                (page.samplesperpixel, *self.shape[1:]) if self._planar else (*self.shape[1:], page.samplesperpixel)
            )
            dtype = page.dtype.newbyteorder(page.parent.byteorder)
            order = (0, 1, 2) if self._planar else (2, 0, 1)
            self._raw = RawPixels(self._bytes.path, int(self._offsets[0]), stored, dtype, order=order, full=self.full)
            return
        self._prepare_segments()

    def _prepare_segments(self) -> None:
        page = self._page
        if page.is_tiled:
            size = page.tilelength, page.tilewidth
        else:
            size = min(page.rowsperstrip, page.imagelength), page.imagewidth
        if min(size) < 1:
            raise DataError(f"{self.path}: damaged segments of {size[0]} x {size[1]} pixels; fetch the file again")
        self._down, self._across = (-(-side // step) for side, step in zip(self.shape[1:], size, strict=True))
        planes = self.shape[0] if self._planar else 1
        if planes * self._down * self._across > len(self._offsets):
            raise DataError(f"{self.path}: {len(self._offsets)} segments are too few; fetch the file again")
        if not self._counts.any():  # single tiles may be missing and have the fill value
            raise DataError(f"{self.path}: contains no pixels; fetch the file again")
        if len(self._offsets) != len(self._counts):
            raise DataError(f"{self.path}: damaged TIFF directory; fetch the file again")
        size_on_disk = self._bytes.path.stat().st_size
        end = int((np.minimum(self._offsets, 2**62) + np.minimum(self._counts, 2**62)).max())
        if end > size_on_disk:
            raise DataError(f"{self.path}: is truncated ({size_on_disk} of {end} bytes); fetch the file again")
        if math.prod(size) * page.samplesperpixel * self.dtype.itemsize > codecs.LARGEST_BYTES:
            raise DataError(f"{self.path}: segments of {size[0]} x {size[1]} pixels; save it in smaller tiles")
        self._size = size
        self._grid = TileGrid(size)
        _ = page.decode, page.jpegtables  # both read the open file once and are cached

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        if self._raw is not None:
            return self._raw.read(top, bottom, left, right)[: self.shape[0]]
        return super().read(top, bottom, left, right)

    def close(self) -> None:
        (self._bytes if self._raw is None else self._raw).close()

    def tile(self, row: int, column: int) -> np.ndarray:
        """The pixels (channels, rows, columns) of a tile or strip."""
        number = row * self._across + column
        if not self._planar:
            return self._segment(number)[..., : self.shape[0]].transpose(2, 0, 1)
        planes = [self._segment(number + plane * self._down * self._across)[..., 0] for plane in range(self.shape[0])]
        return np.stack(planes)

    def _segment(self, index: int) -> np.ndarray:
        """The decoded pixels (rows, columns, samples) of a segment."""
        page = self._page
        count = int(self._counts[index])
        decoded = math.prod(self._size) * page.samplesperpixel * self.dtype.itemsize
        if count > codecs.most_encoded(decoded):
            raise DataError(f"{self.path}: segment {index} has {count} bytes for {decoded} of pixels; it is damaged")
        data = self._bytes.read(int(self._offsets[index]), count) if count else None
        if data is not None:
            self._check(data, index)
        with library_errors(f"{self.path}: segment {index} is damaged", "fetch the file again"):
            decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        if decoded is None:  # a segment that was never written has the fill value
            decoded = np.full(shape, page.nodata, page.dtype)
        if self.dtype.kind == "b" and decoded.dtype == np.uint8:  # fax decoders return a byte per bit
            decoded = decoded.astype(bool)
        if decoded.ndim != 4 or decoded.dtype != page.dtype or decoded.shape[3] != shape[3]:
            raise DataError(f"{self.path}: segment {index} decodes to another shape or type; fetch the file again")
        return decoded[0, : shape[1], : shape[2]]

    def _check(self, data: bytes, index: int) -> None:
        """Refuse a code stream that would decode to more than a segment, or be padded silently."""
        compression = self._page.compression
        if compression in _JPEG and not codecs.has_end_marker(data):
            raise DataError(f"{self.path}: segment {index} is truncated (no end marker); fetch the file again")
        size = None
        if compression in _JPEG:
            size = codecs.jpeg_size(data)
        elif compression in _JPEG_2000:
            size = codecs.jpeg_2000_size(data)
        # JPEG writers may round up to whole blocks.
        if size is not None and not all(
            0 < side <= -(-step // 16) * 16 for side, step in zip(size[:2], self._size, strict=True)
        ):
            raise DataError(f"{self.path}: segment {index} has {size[0]} x {size[1]} pixels; fetch the file again")
