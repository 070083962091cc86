"""Compressed DICOM frames: which decoder for which transfer syntax, and how damage shows.

A damaged frame must not reach a decoder that would crash, ask for all memory there is or fill the image up in silence.
So the size in the code stream is compared with the header's before anything is allocated, and what libraries leave
unchecked is checked here.
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
from .rawfile import one_line

RLE = "1.2.840.10008.1.2.5"
_JPEG, _JPEG_LS, JPEG_2000 = (
    {f"1.2.840.10008.1.2.4.{end}" for end in ends.split()} for ends in ("50 51 57 70", "80 81", "90 91 201 202 203")
)
# Frames are decoded whole. A claim above this is damage or a bomb if it comes from a thousandth of the bytes or fewer
# (deflate cannot do better than 1 in 1032), and too large to be read at all above the second limit.
_SUSPICIOUS_BYTES, _SUSPICIOUS_RATIO, LARGEST_BYTES = 64 * 2**20, 1032, 4 * 2**30
# In entropy-coded data 0xFF goes before a restart marker or, so that it is no marker, a byte below 0x80.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
# Two bytes of PackBits stand for 128 at most.
_RLE_RATIO = 64
_SIZ = b"\xff\x4f\xff\x51"


class Frame(NamedTuple):
    """What a header says about each frame."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    photometric: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a decoded frame: (rows, columns), or (rows, columns, samples)."""
        return (self.rows, self.columns) if self.samples == 1 else (self.rows, self.columns, self.samples)

    @property
    def spare(self) -> int:
        """Pixels that may follow a frame: fewer than a row or column, which would make it another image."""
        return min(self.rows, self.columns) - 1

    @property
    def nbytes(self) -> int:
        """Of a decoded frame."""
        return self.rows * self.columns * self.samples * self.bits_allocated // 8


def most_encoded(decoded: int) -> int:
    """Bytes that a code stream of `decoded` bytes of pixels may have: twice as many, and 16 MiB for what else it says.

    More is never read at once, so a few pixels with gigabytes behind them take no memory.
    """
    return 2 * decoded + 16 * 2**20


def is_known(syntax: str) -> bool:
    """Whether `decode` knows this transfer syntax; pydicom does the others."""
    return syntax in _JPEG | _JPEG_LS | JPEG_2000 | {RLE}


def check_size(decoded: int, stored: int, name: str) -> None:
    """`DataError` if `stored` bytes claim to be `decoded` ones, and that cannot be or is too much."""
    if decoded > LARGEST_BYTES:
        raise DataError(
            f"{name}: would take {decoded / 2**30:.1f} GiB, as it cannot be read by region; convert it to a tiled TIFF"
        )
    if decoded > _SUSPICIOUS_BYTES and decoded > _SUSPICIOUS_RATIO * stored:
        raise DataError(f"{name}: {stored} bytes claim to hold {decoded} bytes of pixels; the file is damaged")


def decode(data: bytes, syntax: str, frame: Frame, name: str) -> np.ndarray:
    """One frame of a compressed image: `frame.shape`, in the dtype of the code stream, colour as RGB.

    `DataError` if it is damaged, ends early or is not of the shape that the header declares.
    """
    check_size(frame.nbytes, len(data), name)
    if syntax == RLE and frame.nbytes > _RLE_RATIO * len(data):
        raise DataError(f"{name}: {len(data)} bytes of RLE cannot hold {frame.nbytes} bytes of pixels; it is damaged")
    declared = _declared(data, syntax) if syntax != RLE else (frame.rows, frame.columns, frame.samples)
    if declared is None:
        raise DataError(f"{name}: the code stream has no header with its size; it is damaged")
    if declared != (frame.rows, frame.columns, frame.samples):
        raise DataError(
            f"{name}: the code stream is {declared[0]} x {declared[1]} with {declared[2]} samples, not "
            f"{frame.rows} x {frame.columns} with {frame.samples} as the header says; it is damaged"
        )
    if syntax in _JPEG and not ends(data):
        raise DataError(f"{name}: pixel data end early (no end marker); fetch the file again")
    try:
        pixels = _decoder(syntax)(data, frame)
    except Exception as error:  # every codec has its own exceptions
        raise DataError(f"{name}: damaged pixel data ({one_line(error)}); fetch the file again") from error
    if pixels.shape != frame.shape:
        raise DataError(f"{name}: decodes to {pixels.shape}, the header says {frame.shape}; it is damaged")
    # The decoder leaves out what it cannot find; an image of one value takes next to no bytes.
    if syntax in JPEG_2000 and len(data) > 1024 + pixels.size // 64 and pixels.min() == pixels.max():
        raise DataError(f"{name}: {len(data)} bytes decode to pixels of one value; they are damaged")
    return pixels


def _decoder(syntax: str) -> Callable[[bytes, Frame], np.ndarray]:
    if syntax in _JPEG:
        return _jpeg
    if syntax in _JPEG_LS:
        return lambda data, _: imagecodecs.jpegls_decode(data)
    # High-throughput JPEG 2000 goes to OpenJPEG too: the binding of OpenJPH swallows the errors of damaged streams.
    return _rle if syntax == RLE else lambda data, _: imagecodecs.jpeg2k_decode(data)


def _jpeg(data: bytes, frame: Frame) -> np.ndarray:
    # Where neither a JFIF nor an Adobe segment says what the components are, the DICOM header does.
    silent = b"JFIF\0" not in data[:64] and b"Adobe" not in data[:256]
    if frame.samples == 3 and silent:
        colorspace = "RGB" if frame.photometric == "RGB" else "YCBCR"
        return imagecodecs.jpeg8_decode(data, colorspace=colorspace, outcolorspace="RGB")
    return imagecodecs.jpeg8_decode(data)


def _rle(data: bytes, frame: Frame) -> np.ndarray:
    """PS3.5 annex G: each byte of each sample is one PackBits segment, the most significant byte first.

    The segments are taken apart here because imagecodecs' own decoder crashes on offsets that point outside. Each is
    decoded no further than the frame goes: one that holds more is of another image, or a bomb.
    """
    count, *offsets = struct.unpack("<16I", data[:64])
    width = frame.bits_allocated // 8
    if count != frame.samples * width:
        raise ValueError(f"{count} segments, {frame.samples * width} expected")
    offsets = [*offsets[:count], len(data)]
    if offsets[0] < 64 or any(first >= last for first, last in itertools.pairwise(offsets)):
        raise ValueError(f"segments at {offsets}")
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


def _declared(data: bytes, syntax: str) -> tuple[int, int, int] | None:
    """(rows, columns, samples) as the code stream says; None if it says nothing."""
    return jpeg_2000_size(data) if syntax in JPEG_2000 else jpeg_size(data)


def ends(data: bytes) -> bool:
    """Whether a JPEG stream is whole: its decoder fills up what is missing and says nothing; the end marker tells.

    Phones and cameras write other data after it, so it is looked for from segment to segment: what a segment holds (a
    thumbnail) may have an end of its own.
    """
    place = 2
    while marker := _MARKER.search(data, place):
        if marker[1] == b"\xd9":
            return True
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False


def jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, samples) in the frame header; None if there is none."""
    place = _frame_header(data)
    return None if place is None else struct.unpack(">HHB", data[place + 5 : place + 10])


def _frame_header(data: bytes) -> int | None:
    """Where the first SOF segment starts (ISO 10918-1 B.2.2; ISO 14495-1 C.2.2 for JPEG-LS)."""
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return place
        else:
            place += 2 + max(length, 2)
    return None


def jpeg_process(data: bytes) -> int | None:
    """The SOF marker's second byte, which names the process (C0 baseline, C3 lossless, F7 JPEG-LS); None without."""
    place = _frame_header(data)
    return None if place is None else data[place + 1]


def jpeg_bits(data: bytes) -> int:
    """Bits of a sample, in the frame header that `jpeg_size` has found."""
    place = _frame_header(data)
    return data[place + 4] if place is not None else 8


def jpeg_2000_size(data: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, samples) in the SIZ segment, which opens every code stream (ISO 15444-1 A.5.1)."""
    start = _code_stream(data)
    if data[start : start + 4] != _SIZ or len(data) < start + 42:
        return None
    right, bottom, left, top, tile_width, tile_height = struct.unpack(">6I", data[start + 8 : start + 32])
    # A damaged tile size makes millions of tiles; real ones are as large as the image or 64 and more.
    if tile_width < min(64, right - left) or tile_height < min(64, bottom - top):
        return -1, -1, -1
    return bottom - top, right - left, int.from_bytes(data[start + 40 : start + 42], "big")


def jpeg_2000_sample(data: bytes) -> tuple[int, bool] | None:
    """(bits, whether they are signed) of the first component (Ssiz, ISO 15444-1 A.5.1); None if nothing says it."""
    start = _code_stream(data)
    if data[start : start + 4] != _SIZ or len(data) < start + 43:
        return None
    return (data[start + 42] & 0x7F) + 1, bool(data[start + 42] & 0x80)


def _code_stream(data: bytes) -> int:
    """Where a JPEG 2000 code stream starts: behind the boxes of a JP2 file (ISO 15444-1 I.4), else at once.

    Boxes are passed over by their lengths: others may hold what looks like a code stream.
    """
    place = 0
    while data[4:8] == b"jP  " and place + 16 <= len(data):
        length, kind, long = struct.unpack(">I4sQ", data[place : place + 16])
        head, length = (16, long) if length == 1 else (8, length)
        if kind == b"jp2c":
            return place + head
        if length < head:
            break
        place += length
    return place
