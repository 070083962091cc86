"""Compressed DICOM frames: which decoder for which transfer syntax, and how damage shows."""

from __future__ import annotations

import struct
from collections.abc import Callable

import imagecodecs
import numpy as np

from ..errors import DataError
from .rawfile import one_line

_JPEG = "1.2.840.10008.1.2.4."
# imagecodecs decodes all of these bit-exactly, also 12-bit JPEG Extended (.51), which pydicom's plugins do not. High
# throughput JPEG 2000 (.201 to .203) goes to OpenJPEG: the binding of OpenJPH swallows the errors of damaged streams.
_DECODERS: dict[str, Callable[..., np.ndarray]] = {
    **dict.fromkeys([_JPEG + end for end in ("50", "51", "57", "70")], imagecodecs.jpeg8_decode),
    **dict.fromkeys([_JPEG + end for end in ("80", "81")], imagecodecs.jpegls_decode),
    **dict.fromkeys([_JPEG + end for end in ("90", "91", "201", "202", "203")], imagecodecs.jpeg2k_decode),
}
# JPEG fills up the image when its data end early, and says nothing; the end marker tells.
_SILENT = {_JPEG + end for end in ("50", "51", "57", "70")}


def is_known(syntax: str) -> bool:
    """Whether `decode` knows this transfer syntax; pydicom does the others."""
    return syntax in _DECODERS


def decode(data: bytes, syntax: str, shape: tuple[int, int], name: str) -> np.ndarray:
    """One frame of a compressed image: (rows, columns) in the dtype of the code stream.

    `DataError` if it is damaged, ends early or is not of the shape (rows, columns) that the header declares.
    """
    if _is_jpeg_2000(syntax) and _jpeg_2000_shape(data) not in (shape, None):
        # Before decoding: for a damaged size the decoder may ask for all memory there is.
        raise DataError(
            f"{name}: the JPEG 2000 stream is not {shape[0]} x {shape[1]} as the header says; it is damaged"
        )
    if syntax in _SILENT and not data.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise DataError(f"{name}: pixel data end early (no end marker); fetch the file again")
    try:
        pixels = _DECODERS[syntax](data)
    except Exception as error:  # every codec has its own exceptions
        raise DataError(f"{name}: damaged pixel data ({one_line(error)}); fetch the file again") from error
    if pixels.shape != shape:
        raise DataError(f"{name}: decodes to {pixels.shape}, the header says {shape}; it is damaged")
    return pixels


def _is_jpeg_2000(syntax: str) -> bool:
    return _DECODERS[syntax] is imagecodecs.jpeg2k_decode


def _jpeg_2000_shape(data: bytes) -> tuple[int, int] | None:
    """(rows, columns) in the SIZ segment, which opens every code stream (ISO 15444-1 A.5.1); None if there is none."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 40:
        return None
    right, bottom, left, top, tile_width, tile_height = struct.unpack(">6I", data[start + 8 : start + 32])
    # A damaged tile size makes millions of tiles; real ones are as large as the image or 64 and more.
    if tile_width < min(64, right - left) or tile_height < min(64, bottom - top):
        return -1, -1
    return bottom - top, right - left
