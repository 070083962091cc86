"""PNG and JPEG files: no random access, so they are decoded whole at the first read, in their own dtype."""

from __future__ import annotations

import math
import struct
import threading
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from ..errors import DataError
from . import codecs
from .affine import Affine
from .rawfile import one_line

# Channels that count as pixels, by the colour type in the header; alpha is dropped.
_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}
_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


class WholeFile:
    """Stored pixels (`stored.StoredPixels`) of a file that is decoded in one piece; a base class."""

    table = None
    self_describing = False
    to_original = Affine()
    shape: tuple[int, int, int]
    dtype: np.dtype
    full: float
    steps: tuple[str, ...]

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        self._pixels: np.ndarray | None = None
        self._lock = threading.Lock()
        try:
            self._describe()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        codecs.check_size(math.prod(self.shape) * self.dtype.itemsize, path.stat().st_size, self.name)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decoded()
        return self._pixels[:, top:bottom, left:right]

    def flips(self) -> tuple[bool, bool]:
        return False, False

    def _describe(self) -> None:
        """Set shape, dtype, full and steps from the header."""
        raise NotImplementedError

    def _decode(self, data: bytes) -> np.ndarray:
        """(rows, columns) or (rows, columns, samples)."""
        raise NotImplementedError

    def _decoded(self) -> np.ndarray:
        try:
            pixels = self._decode(self.path.read_bytes())
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        except Exception as error:  # every codec has its own exceptions
            raise DataError(
                f"{self.path}: damaged or truncated image ({one_line(error)}); fetch the file again"
            ) from error
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        pixels = pixels[:, :, : self.shape[0]].transpose(2, 0, 1)
        if pixels.shape != self.shape or pixels.dtype != self.dtype:
            raise DataError(
                f"{self.path}: decodes to {pixels.dtype} {pixels.shape}, its header says {self.dtype} {self.shape}"
            )
        return pixels


class PngPixels(WholeFile):
    """A PNG file; grey, or colour with alpha dropped."""

    def _describe(self) -> None:
        with self.path.open("rb") as file:
            head = file.read(33)
        if len(head) < 33 or head[12:16] != b"IHDR":
            raise DataError(f"{self.path}: damaged PNG header; fetch the file again")
        width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
        if bits not in _BITS.get(colour, ()) or not width or not height:
            raise DataError(f"{self.path}: damaged PNG header; fetch the file again")
        self.shape = (_CHANNELS[colour], height, width)
        # Fewer than 8 bits are spread over 8 by the decoder.
        self.dtype = np.dtype(np.uint16 if bits == 16 else np.uint8)
        self.full = 65535.0 if bits == 16 else 255.0
        self.steps = (f"PNG, {bits} bits",)

    def _decode(self, data: bytes) -> np.ndarray:
        return imagecodecs.png_decode(data)


class JpegPixels(WholeFile):
    """A JPEG or JPEG-LS file of any bits; grey or RGB."""

    def _describe(self) -> None:
        data = self.path.read_bytes()
        size = codecs.jpeg_size(data)
        if size is not None and size[2] == 4:
            raise DataError(f"{self.path}: is a JPEG of four colours (CMYK); save it as grey or RGB")
        if size is None or not all(size) or size[2] not in (1, 3):
            raise DataError(f"{self.path}: damaged JPEG header; fetch the file again")
        if not codecs.ends(data):
            raise DataError(f"{self.path}: ends early (no end marker); fetch the file again")
        bits = codecs.jpeg_bits(data)
        self.shape = (size[2], size[0], size[1])
        self.dtype = np.dtype(np.uint8 if bits <= 8 else np.uint16)
        self.full = float(2**bits - 1)
        self.steps = (f"JPEG, {bits} bits",)

    def _decode(self, data: bytes) -> np.ndarray:
        if codecs.jpeg_process(data) == 0xF7:  # JPEG-LS
            return imagecodecs.jpegls_decode(data)
        return imagecodecs.jpeg8_decode(data)
