"""PNG files, 8 and 16 bit: no random access, so they are decoded whole at the first read, in their own dtype."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from ..errors import DataError
from .rawfile import one_line

# Channels that count as pixels, by the colour type in the header; alpha is dropped.
_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}


class PngPixels:
    """Stored pixels (`pixels.StoredPixels`) of a PNG file; grey, or colour with alpha dropped."""

    table = None

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        with path.open("rb") as file:
            head = file.read(33)
        if len(head) < 33 or head[12:16] != b"IHDR":
            raise DataError(f"{path}: damaged PNG header; fetch the file again")
        width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
        if colour not in _CHANNELS or not width or not height:
            raise DataError(f"{path}: damaged PNG header; fetch the file again")
        self.shape = (_CHANNELS[colour], height, width)
        # Fewer than 8 bits are spread over 8 by the decoder.
        self.full = 65535.0 if bits == 16 else 255.0
        self._pixels: np.ndarray | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decode()
        return self._pixels[:, top:bottom, left:right]

    def flips(self) -> tuple[bool, bool]:
        return False, False

    def _decode(self) -> np.ndarray:
        try:
            data = self.path.read_bytes()
            pixels = imagecodecs.png_decode(data)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        except (imagecodecs.PngError, ValueError) as error:
            raise DataError(
                f"{self.path}: damaged or truncated PNG ({one_line(error)}); fetch the file again"
            ) from error
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        pixels = pixels[:, :, : self.shape[0]].transpose(2, 0, 1)
        if pixels.shape != self.shape:
            raise DataError(f"{self.path}: decodes to {pixels.shape}, its header says {self.shape}")
        return pixels
