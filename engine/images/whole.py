"""PNG, JPEG and JPEG 2000 files: without random access, so the first read decodes them whole, in their own dtype."""

from __future__ import annotations

import math
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from ..errors import DataError
from . import codecs
from .rawfile import library_errors, reading
from .stored import StoredPixels

# Channels without alpha, which is dropped, by the colour type in the header.
_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}
# The maximum bytes after the last row; more is damage.
_SURPLUS = 2**16
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# First row, first column and steps of the passes: of a PNG without and with interlacing.
_PASSES = (
    ((0, 0, 1, 1),),
    ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
)
_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


class WholeFile(StoredPixels):
    """Stored pixels (`stored.StoredPixels`) of a file that is decoded as a whole; a base class."""

    by_region = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        self._pixels: np.ndarray | None = None
        self._lock = threading.Lock()
        with reading(path):
            self._describe()
        codecs.check_size(math.prod(self.shape) * self.dtype.itemsize, path.stat().st_size, self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decoded()
            return self._pixels[:, top:bottom, left:right]

    def close(self) -> None:
        self._pixels = None

    def _describe(self) -> None:
        """Set shape, dtype, full and steps from the header."""
        raise NotImplementedError

    def _decode(self) -> np.ndarray:
        """The decoded pixels, (rows, columns) or (rows, columns, samples)."""
        raise NotImplementedError

    def _first_bytes(self, count: int) -> bytes:
        """The first `count` bytes of the file, or all if it is shorter; any data may follow the image."""
        with self.path.open("rb") as file:
            return file.read(min(count, self.path.stat().st_size))

    @property
    def _max_bytes(self) -> int:
        """The maximum number of bytes that are read from the file."""
        return codecs.most_encoded(math.prod(self.shape) * self.dtype.itemsize)

    def _decoded(self) -> np.ndarray:
        with library_errors(f"{self.path}: damaged or truncated image", "fetch the file again"), reading(self.path):
            pixels = self._decode()
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        pixels = pixels[:, :, : self.shape[0]].transpose(2, 0, 1)
        if pixels.shape != self.shape or pixels.dtype != self.dtype:
            raise DataError(
                f"{self.path}: decodes to {pixels.dtype} {pixels.shape}, but its header has {self.dtype} {self.shape}"
            )
        return pixels


def _chunk(kind: bytes, data: bytes | memoryview) -> bytes:
    """A chunk of a PNG file (ISO 15948, 5.3)."""
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))))


class PngPixels(WholeFile):
    """A PNG file; grey, or colour with alpha dropped."""

    def _describe(self) -> None:
        with self.path.open("rb") as file:
            head = file.read(33)
        if len(head) < 33 or head[12:16] != b"IHDR":
            raise DataError(f"{self.path}: damaged PNG header; fetch the file again")
        width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", head[16:29])
        if interlaced > 1 or bits not in _BITS.get(colour, ()) or not width or not height:
            raise DataError(f"{self.path}: damaged PNG header; fetch the file again")
        self.shape = (_CHANNELS[colour], height, width)
        # The decoder scales fewer than 8 bits to 8.
        self.dtype = np.dtype(np.uint16 if bits == 16 else np.uint8)
        self.full = 65535.0 if bits == 16 else 255.0
        self.steps = (f"PNG, {bits} bits",)
        samples = _SAMPLES[colour]
        passes = [(-(-(height - y) // dy), -(-(width - x) // dx)) for y, x, dy, dx in _PASSES[interlaced]]
        # Each row starts with a byte for its filter.
        self._inflated = sum(rows * (1 + -(-columns * bits * samples // 8)) for rows, columns in passes if columns > 0)

    def _decode(self) -> np.ndarray:
        """Decode with libpng, from data inflated here with a limit, because libpng inflates without one."""
        chunks = self._chunks()
        packed = b"".join(chunk[8:-4] for chunk in chunks if chunk[4:8] == b"IDAT")
        try:
            rows = imagecodecs.deflate_decode(packed, out=self._inflated + _SURPLUS)
        except imagecodecs.DeflateError as error:
            raise DataError(
                f"{self.path}: damaged PNG, or more pixels than in its header; fetch the file again"
            ) from error
        stored = memoryview(zlib.compress(rows, 0))  # uncompressed, so that libpng only copies it
        del rows, packed
        parts = [_chunk(b"IDAT", stored[start : start + 2**30]) for start in range(0, len(stored), 2**30)]
        head = [chunk for chunk in chunks if chunk[4:8] not in (b"IDAT", b"IEND")]
        return imagecodecs.png_decode(b"".join((*head, *parts, _chunk(b"IEND", b""))))

    def _chunks(self) -> list[bytes]:
        """The chunks of the file up to its end marker, without ancillary chunks."""
        found, size = [b"\x89PNG\r\n\x1a\n"], 0
        with self.path.open("rb") as file:
            file.seek(8)
            while True:
                head = file.read(8)
                length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
                if kind[:1].islower():  # ancillary chunks may be left out (ISO 15948, 5.4)
                    file.seek(length + 4, 1)
                    continue
                size += length
                if not kind or size > self._max_bytes:
                    raise DataError(f"{self.path}: damaged or truncated image; fetch the file again")
                found.append(head + file.read(length + 4))
                if kind == b"IEND":
                    return found


class JpegPixels(WholeFile):
    """A JPEG or JPEG-LS file of any bit depth; grey or RGB."""

    def _describe(self) -> None:
        data = self._first_bytes(codecs.most_encoded(0))
        size = codecs.jpeg_size(data)
        if size is not None and size[2] == 4:
            raise DataError(f"{self.path}: is a CMYK JPEG; save it as grey or RGB")
        if size is None or not all(size) or size[2] not in (1, 3):
            raise DataError(f"{self.path}: damaged JPEG header; fetch the file again")
        bits = codecs.jpeg_bits(data)
        self.shape = (size[2], size[0], size[1])
        self.dtype = np.dtype(np.uint8 if bits <= 8 else np.uint16)
        self.full = float(2**bits - 1)
        self.steps = (f"JPEG, {bits} bits",)
        if not codecs.has_end_marker(data) and not codecs.has_end_marker(self._first_bytes(self._max_bytes)):
            raise DataError(f"{self.path}: is truncated (no end marker); fetch the file again")

    def _decode(self) -> np.ndarray:
        data = self._first_bytes(self._max_bytes)
        if codecs.jpeg_process(data) == 0xF7:  # JPEG-LS
            return imagecodecs.jpegls_decode(data)
        return imagecodecs.jpeg8_decode(data)


class Jpeg2000Pixels(WholeFile):
    """A JPEG 2000 file (.jp2) or code stream of unsigned samples; grey or RGB."""

    def _describe(self) -> None:
        data = self._first_bytes(codecs.most_encoded(0))
        size, sample = codecs.jpeg_2000_size(data), codecs.jpeg_2000_sample(data)
        if size is None or sample is None or min(size) < 1 or sample[0] > 16:
            raise DataError(f"{self.path}: damaged JPEG 2000 header; fetch the file again")
        if size[2] not in (1, 3) or sample[1]:
            raise DataError(f"{self.path}: has {size[2]} channels or signed samples; save it as grey or RGB")
        self.shape = (size[2], size[0], size[1])
        self.dtype = np.dtype(np.uint8 if sample[0] <= 8 else np.uint16)
        self.full = float(2 ** sample[0] - 1)
        self.steps = (f"JPEG 2000, {sample[0]} bits",)

    def _decode(self) -> np.ndarray:
        data = self._first_bytes(self._max_bytes)
        if not data.rstrip(b"\0").endswith(b"\xff\xd9"):  # the decoder skips missing data silently
            raise DataError(f"{self.path}: is truncated (no end marker); fetch the file again")
        return imagecodecs.jpeg2k_decode(data)
