"""Compressed DICOM frames: the decoders of the transfer syntaxes, and checks for damage.

A damaged frame must not reach a decoder that would crash, allocate all memory or pad the image silently. So the size in
the code stream is compared with the header before anything is allocated, with the checks that libraries lack.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable
from typing import NamedTuple

import imagecodecs
import numpy as np

from ..errors import DataError
from .rawfile import library_errors

RLE = "1.2.840.10008.1.2.5"
_JPEG, _JPEG_LS, JPEG_2000 = (
    {f"1.2.840.10008.1.2.4.{end}" for end in ends.split()} for ends in ("50 51 57 70", "80 81", "90 91 201 202 203")
)
# Frames are decoded whole. A size above the first limit with less than 1/1032 of the bytes is damage or a bomb (deflate
# compresses at most to 1/1032); a size above the last limit is not decoded.
_SUSPICIOUS_BYTES, _SUSPICIOUS_RATIO, LARGEST_BYTES = 64 * 2**20, 1032, 4 * 2**30
# In entropy-coded data 0xFF precedes a restart marker or a byte below 0x80, which is not a marker.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
# Two bytes of PackBits decode to at most 128.
_RLE_RATIO = 64
_SIZ = b"\xff\x4f\xff\x51"


class Frame(NamedTuple):
    """The format of a frame by its header."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    photometric: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a decoded frame: (rows, columns), or (rows, columns, samples)."""
        return (self.rows, self.columns) if self.samples == 1 else (self.rows, self.columns, self.samples)

    @property
    def spare(self) -> int:
        """The number of pixels that may follow a frame: less than a row or column, so the size is certain."""
        return min(self.rows, self.columns) - 1

    @property
    def nbytes(self) -> int:
        """The bytes of a decoded frame."""
        return self.rows * self.columns * self.samples * self.bits_allocated // 8


def most_encoded(decoded: int) -> int:
    """The maximum bytes of a code stream for `decoded` bytes of pixels: twice as many, and 16 MiB for other data.

    More is never read at once, so a small image followed by gigabytes does not fill the memory.
    """
    return 2 * decoded + 16 * 2**20


def is_known(syntax: str) -> bool:
    """Whether `decode` supports this transfer syntax, as it does all compressed ones that pydicom decodes."""
    return syntax in _JPEG | _JPEG_LS | JPEG_2000 | {RLE}


def check_size(decoded: int, stored: int, name: str) -> None:
    """Raise a `DataError` if `stored` bytes cannot decode to `decoded` bytes, or these are too many."""
    if decoded > LARGEST_BYTES:
        raise DataError(
            f"{name}: needs {decoded / 2**30:.1f} GiB, because it cannot be read by region; convert it to a tiled TIFF"
        )
    if decoded > _SUSPICIOUS_BYTES and decoded > _SUSPICIOUS_RATIO * stored:
        raise DataError(f"{name}: {stored} bytes cannot contain {decoded} bytes of pixels; the file is damaged")


def decode(data: bytes, syntax: str, frame: Frame, name: str) -> np.ndarray:
    """Decode a frame of a compressed image to `frame.shape`, in the dtype of the code stream, colour as RGB.

    Raises:
        DataError: if it is damaged, truncated, or differs in shape from the header.
    """
    check_size(frame.nbytes, len(data), name)
    if syntax == RLE and frame.nbytes > _RLE_RATIO * len(data):
        raise DataError(f"{name}: {len(data)} RLE bytes cannot contain {frame.nbytes} bytes of pixels; it is damaged")
    wanted = frame.rows, frame.columns, frame.samples
    declared = wanted if syntax == RLE else jpeg_2000_size(data) if syntax in JPEG_2000 else jpeg_size(data)
    if declared is None:
        raise DataError(f"{name}: the code stream has no header with its size; it is damaged")
    if declared != wanted:
        raise DataError(
            f"{name}: the code stream is {declared[0]} x {declared[1]} with {declared[2]} samples, not "
            f"{frame.rows} x {frame.columns} with {frame.samples} as in the header; it is damaged"
        )
    if syntax in _JPEG and not has_end_marker(data):
        raise DataError(f"{name}: pixel data end early (no end marker); fetch the file again")
    with library_errors(f"{name}: damaged pixel data", "fetch the file again"):
        pixels = _decoder(syntax)(data, frame)
    if pixels.shape != frame.shape:
        raise DataError(f"{name}: decodes to {pixels.shape}, but the header has {frame.shape}; it is damaged")
    # The decoder skips missing data silently; a real image of one value has almost no bytes.
    if syntax in JPEG_2000 and len(data) > 1024 + pixels.size // 64 and pixels.min() == pixels.max():
        raise DataError(f"{name}: {len(data)} bytes decode to pixels of one value; they are damaged")
    return pixels


def _decoder(syntax: str) -> Callable[[bytes, Frame], np.ndarray]:
    if syntax in _JPEG:
        return _jpeg
    if syntax in _JPEG_LS:
        return lambda data, _: imagecodecs.jpegls_decode(data)
    # OpenJPEG also decodes high-throughput JPEG 2000, because the binding of OpenJPH ignores errors of damaged streams.
    return _rle if syntax == RLE else lambda data, _: imagecodecs.jpeg2k_decode(data)


def _jpeg(data: bytes, frame: Frame) -> np.ndarray:
    # Without a JFIF or Adobe segment, the DICOM header determines the colour space.
    undeclared = b"JFIF\0" not in data[:64] and b"Adobe" not in data[:256]
    if frame.samples == 3 and undeclared:
        colorspace = "RGB" if frame.photometric == "RGB" else "YCBCR"
        return imagecodecs.jpeg8_decode(data, colorspace=colorspace, outcolorspace="RGB")
    return imagecodecs.jpeg8_decode(data)


def _rle(data: bytes, frame: Frame) -> np.ndarray:
    """Decode RLE (PS3.5 annex G): each byte of each sample is a PackBits segment, the most significant byte first.

    The segments are split here because imagecodecs' own decoder crashes on offsets beyond the data. A segment is
    decoded up to the size of the frame: a longer one is from another image, or a bomb.
    """
    count, *offsets = struct.unpack("<16I", data[:64])
    width = frame.bits_allocated // 8
    if count != frame.samples * width:
        raise ValueError(f"{count} segments instead of {frame.samples * width}")
    offsets = [*offsets[:count], len(data)]
    if offsets[0] < 64 or any(first >= last for first, last in itertools.pairwise(offsets)):
        raise ValueError(f"invalid segment offsets {offsets}")
    pixels = np.empty((frame.samples, frame.rows, frame.columns, width), np.uint8)
    for number in range(count):
        packed = data[offsets[number] : offsets[number + 1]]
        segment = imagecodecs.packbits_decode(packed, out=frame.rows * frame.columns + max(frame.spare, 1))
        if len(segment) < frame.rows * frame.columns:
            raise ValueError(f"segment {number} ends early")
        plane = np.frombuffer(segment, np.uint8, frame.rows * frame.columns).reshape(frame.rows, frame.columns)
        pixels[number // width, :, :, width - 1 - number % width] = plane
    words = pixels.view(f"<u{width}")[..., 0]
    return words[0] if frame.samples == 1 else np.ascontiguousarray(words.transpose(1, 2, 0))


def has_end_marker(data: bytes) -> bool:
    """Whether a JPEG stream is complete; without its end marker, the decoder pads missing data silently.

    Cameras write other data after the marker, and segments may contain a thumbnail with its own end marker. So the
    search goes from segment to segment.
    """
    position = 2
    while marker := _MARKER.search(data, position):
        if marker[1] == b"\xd9":
            return True
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False


def jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, samples) in the frame header; None without one."""
    start = _frame_header(data)
    return None if start is None else struct.unpack(">HHB", data[start + 5 : start + 10])


def _frame_header(data: bytes) -> int | None:
    """The position of the first SOF segment (ISO 10918-1 B.2.2; ISO 14495-1 C.2.2 for JPEG-LS)."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return position
        else:
            position += 2 + max(length, 2)
    return None


def jpeg_process(data: bytes) -> int | None:
    """The SOF marker's second byte, the process (C0 baseline, C3 lossless, F7 JPEG-LS); None without a marker."""
    start = _frame_header(data)
    return None if start is None else data[start + 1]


def jpeg_bits(data: bytes) -> int:
    """Bits of a sample in the frame header; 8 without one."""
    start = _frame_header(data)
    return data[start + 4] if start is not None else 8


def jpeg_2000_size(data: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, samples) in the SIZ segment, the first of a code stream (ISO 15444-1 A.5.1); None without one."""
    start = _code_stream(data)
    if data[start : start + 4] != _SIZ or len(data) < start + 42:
        return None
    right, bottom, left, top, tile_width, tile_height = struct.unpack(">6I", data[start + 8 : start + 32])
    # A damaged tile size may mean millions of tiles; real tiles have the size of the image, or at least 64.
    if tile_width < min(64, right - left) or tile_height < min(64, bottom - top):
        return -1, -1, -1
    return bottom - top, right - left, int.from_bytes(data[start + 40 : start + 42], "big")


def jpeg_2000_sample(data: bytes) -> tuple[int, bool] | None:
    """(bits, signed) of the first component (Ssiz, ISO 15444-1 A.5.1); None without a SIZ segment."""
    start = _code_stream(data)
    if data[start : start + 4] != _SIZ or len(data) < start + 43:
        return None
    return (data[start + 42] & 0x7F) + 1, bool(data[start + 42] & 0x80)


def _code_stream(data: bytes) -> int:
    """The start of a JPEG 2000 code stream: after the boxes of a JP2 file (ISO 15444-1 I.4), otherwise 0.

    Boxes are skipped by their lengths, because they may contain bytes that look like a code stream.
    """
    position = 0
    while data[4:8] == b"jP  " and position + 16 <= len(data):
        length, kind, long = struct.unpack(">I4sQ", data[position : position + 16])
        head, length = (16, long) if length == 1 else (8, length)
        if kind == b"jp2c":
            return position + head
        if length < head:
            break
        position += length
    return position
