"""DICOM files: the header, and the positions of the frames in the file (PS3.5 A.4, PS3.10 7).

Files are not trusted: lengths are checked against the file before anything is read or allocated, a deflated file is
inflated only up to the pixels that its header declares, and a truncated file raises an error that names it.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydicom import dcmread
from pydicom import uid as uids
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from ..errors import DataError
from . import codecs
from .rawfile import FileBytes, library_errors, reading, warn_once

# The number of bytes that are inflated for a header; headers of images have kilobytes.
_INFLATED_HEADER = 16 * 2**20
# The limit of fragments, because the search for frames would be slow with many empty ones.
_FRAGMENTS = 2**20
_ITEM, _SEQUENCE_END = 0xE000FFFE, 0xE0DDFFFE


_validation_lock = threading.RLock()


def _after_fork() -> None:
    """Replace the lock in a forked process, where it may stay locked by a thread of the parent."""
    global _validation_lock
    _validation_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def without_validation() -> Iterator[None]:
    """Context without pydicom's validation, whose warnings print odd values, including patients' identifiers.

    The setting is global to the process; the lock keeps threads from restoring each other's value.
    """
    with _validation_lock, disable_value_validation():
        yield


class DicomFile(io.BufferedReader):
    """A file for pydicom: reads never allocate more than the bytes of the file, and pydicom inflates nothing.

    Attributes:
        deflated: the start of the deflate stream; None without one.
    """

    deflated: int | None = None

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise DataError(f"{path}: is not a regular file; pass an image")
        self.path = path
        with reading(path):
            self._bytes: Any = path.open("rb", buffering=0)
            super().__init__(self._bytes)
            self.size = self.seek(0, 2)
        self.seek(0)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # pydicom would inflate all of it without a limit
            raise DataError(f"{self.path}: is deflated after an unusual header; save it uncompressed")
        if size > 2**16:
            size = min(size, max(0, self.size - self.tell()))
        return super().read(size)

    def at(self, position: int, count: int) -> bytes:
        """`count` bytes from a position on, fewer at the end of the file; only these are read."""
        self._bytes.seek(position)
        return self._bytes.read(count) or b""


def read_header(file: DicomFile, path: Path) -> tuple[Dataset, io.BufferedIOBase]:
    """The data set before the pixels, and the stream positioned at the pixel data element."""
    with library_errors(f"{path}: damaged or truncated DICOM header", "fetch the file again"):
        stream = _inflated_header(file, path)
        ds = dcmread(stream, stop_before_pixels=True, force=True)
        if stream is not file:
            ds.file_meta.TransferSyntaxUID = uids.DeflatedExplicitVRLittleEndian
        elif "TransferSyntaxUID" not in ds.file_meta:  # a data set without prefix and meta information
            implicit, _little = ds.original_encoding
            ds.file_meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian if implicit else uids.ExplicitVRLittleEndian
        missing = [key for key in ("Rows", "Columns", "BitsAllocated", "BitsStored") if ds.get(key) is None]
        index = ds.file_meta.get("MediaStorageSOPClassUID") == uids.MediaStorageDirectoryStorage
    if missing and index:
        raise DataError(f"{path}: is a DICOMDIR, the index of a medium, not an image; pass the folder of its images")
    if missing:
        raise DataError(f"{path}: has no {missing[0]} in its header: not an image, or truncated; fetch the file again")
    return ds, stream


def _inflated_header(file: DicomFile, path: Path) -> io.BufferedIOBase:
    """The file or, if it is deflated, the first part of the inflated data set."""
    head = file.read(4096)
    file.seek(0)
    if uids.DeflatedExplicitVRLittleEndian.encode() not in head:
        return file
    # The first element of the meta information is its length (PS3.10 7.1).
    if head[128:140] != b"DICM\2\0\0\0UL\4\0" or len(head) < 144:
        raise DataError(f"{path}: damaged or truncated DICOM header; fetch the file again")
    file.deflated = 144 + struct.unpack("<I", head[140:144])[0]
    return io.BytesIO(_inflate(path, file.deflated, _INFLATED_HEADER))


def _inflate(path: Path, start: int, count: int, skip: int = 0) -> bytearray:
    """`count` bytes of the deflate stream at byte `start`, after the first `skip`; fewer at its end.

    Only these bytes are stored.
    """
    stream, done, found = zlib.decompressobj(-zlib.MAX_WBITS), 0, bytearray()
    with path.open("rb") as file:
        file.seek(start)
        while len(found) < count and not stream.eof and (data := file.read(2**20)):
            part = b"more"
            # Output may remain after the input is consumed, and input after the end of the stream.
            while (data or part) and len(found) < count and not stream.eof:
                part = stream.decompress(data, min(skip + count - done, 2**20))
                found += memoryview(part)[max(skip - done, 0) :]
                done += len(part)
                data = stream.unconsumed_tail
    return found


@dataclass(frozen=True)
class StoredFrames:
    """The frames of a DICOM file, with their format and positions."""

    path: Path
    syntax: str
    frame: codecs.Frame
    count: int
    planar: bool
    """Whether colours are stored plane by plane instead of pixel by pixel; uncompressed frames only."""
    shift: int
    """The number of bits below the lowest stored bit."""
    bits: int
    """BitsStored."""
    signed: bool
    """PixelRepresentation: the highest stored bit is the sign."""
    offset: int | None = None
    """The position of the first frame, if uncompressed: in the file, or in the inflated data."""
    deflated: int | None = None
    """The start of the deflate stream in the file."""
    swapped: bool = False
    """Whether 8-bit pixels are in big-endian words."""
    ranges: np.ndarray | None = None
    """First byte and end of each frame's items in the file, if compressed; int64 (count, 2)."""

    @classmethod
    def of(cls, ds: Dataset, path: Path, frame: codecs.Frame, syntax: uids.UID, **positions: Any) -> Self:
        """The frames that a header describes (see `frame_of`), with the fields on their positions."""
        return cls(
            path=path,
            syntax=str(syntax),
            frame=frame,
            count=int(ds.get("NumberOfFrames") or 1),
            planar=frame.samples > 1 and not syntax.is_encapsulated and int(ds.get("PlanarConfiguration") or 0) == 1,
            shift=_high_bit(ds) + 1 - int(ds.BitsStored),
            bits=int(ds.BitsStored),
            signed=bool(ds.get("PixelRepresentation", 0)),
            **positions,
        )

    @property
    def dtype(self) -> np.dtype:
        """The dtype of decoded frames."""
        return np.dtype(np.uint8 if self.frame.bits_allocated == 8 else np.uint16)

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype of uncompressed frames in the file."""
        return self.dtype.newbyteorder(">" if self.syntax == uids.ExplicitVRBigEndian else "<")

    @property
    def compressed(self) -> bool:
        return uids.UID(self.syntax).is_encapsulated

    @property
    def by_region(self) -> bool:
        """Whether a part of a frame can be read separately."""
        return self.offset is not None and self.deflated is None and not self.swapped and not self.planar

    def decode(self, index: int) -> np.ndarray:
        """A frame as unsigned bit patterns of BitsStored bits, of shape `frame.shape`, writable."""
        pixels = self._pixels(index)
        if pixels.shape != self.frame.shape:
            raise DataError(
                f"{self.path}: decodes to {pixels.shape}, but the header has {self.frame.shape}; it is damaged"
            )
        if pixels.dtype.kind not in "ui" or not self.bits <= 8 * pixels.dtype.itemsize <= 16:
            raise DataError(f"{self.path}: decodes to {pixels.dtype}, not {self.bits} bits; it is damaged")
        if pixels.dtype.kind == "i":  # the same bits, as indices of the table
            pixels = pixels.view(pixels.dtype.str.replace("i", "u"))
        pixels = pixels.astype(self.dtype, copy=False)
        # Words of uncompressed pixels and RLE may have other bits; in other code streams these would be pixel values.
        used = int(pixels.max()).bit_length() - self.shift
        if used > self.bits and not self.signed and self.compressed and self.syntax != codecs.RLE:
            raise DataError(f"{self.path}: pixels have {used} bits, but BitsStored is {self.bits}; correct the header")
        return self.patterns(pixels if pixels.flags.writeable else pixels.copy())

    def patterns(self, values: np.ndarray) -> np.ndarray:
        """The BitsStored bits of each value, in place; higher bits are overlays, copies of the sign or garbage."""
        if self.shift:
            np.right_shift(values, self.shift, out=values)
        if self.bits < 8 * values.dtype.itemsize:
            np.bitwise_and(values, values.dtype.type(2**self.bits - 1), out=values)
        return values

    def _pixels(self, index: int) -> np.ndarray:
        if self.offset is not None:
            return self._uncompressed(index)
        if not codecs.is_known(self.syntax):
            raise DataError(f"{self.path}: pixel data cannot be decoded ({uids.UID(self.syntax).name}); convert it")
        return codecs.decode(self._data(index), self.syntax, self.frame, str(self.path))

    def _data(self, index: int) -> bytes:
        """The code stream of a frame: the joined values of its items."""
        assert self.ranges is not None
        start, end = (int(position) for position in self.ranges[index])
        if end - start > codecs.most_encoded(self.frame.nbytes):
            sizes = f"{end - start} bytes for {self.frame.nbytes} bytes of pixels"
            raise DataError(f"{self.path}: frame {index} has {sizes}; it is damaged")
        data, at, parts = FileBytes(self.path).read(start, end - start), 0, []
        while at < len(data):
            tag, length = struct.unpack("<II", data[at : at + 8]) if at + 8 <= len(data) else (0, 0)
            if tag != _ITEM or at + 8 + length > len(data):
                raise DataError(f"{self.path}: frame {index} is damaged at byte {start + at}; fetch the file again")
            parts.append(data[at + 8 : at + 8 + length])
            at += 8 + length
        return b"".join(parts)

    def _uncompressed(self, index: int) -> np.ndarray:
        assert self.offset is not None
        size = self.frame.nbytes
        start = self.offset + index * size
        odd = start % 2 if self.swapped else 0  # read whole words
        start, count = start - odd, size + odd + (size + odd) % 2 if self.swapped else size
        if self.deflated is None:
            data = FileBytes(self.path).read(start, count)
        else:
            codecs.check_size(size, self.path.stat().st_size, str(self.path))
            data = _inflate(self.path, self.deflated, count, skip=start)
        if len(data) < count:
            raise DataError(f"{self.path}: is truncated in its pixel data; fetch the file again")
        if self.swapped:
            data = np.frombuffer(data, "<u2").byteswap().tobytes()[odd:]
        return self._shaped(np.frombuffer(data, self.stored_dtype, size // self.dtype.itemsize))

    def _shaped(self, pixels: np.ndarray) -> np.ndarray:
        """Uncompressed pixels of a frame, in shape `frame.shape`."""
        frame = self.frame
        if self.planar:
            return pixels.reshape(frame.samples, frame.rows, frame.columns).transpose(1, 2, 0)
        return pixels.reshape(frame.shape)


def locate_frames(ds: Dataset, file: DicomFile, stream: Any, path: Path) -> StoredFrames:
    """Locate the frames; `stream` is at the position of `read_header`. `DataError` if the file is too short."""
    syntax, frame, count = (
        uids.UID(str(ds.file_meta.TransferSyntaxUID)),
        frame_of(ds, path),
        int(ds.get("NumberOfFrames") or 1),
    )
    high, stored = _high_bit(ds), int(ds.BitsStored)
    if high != stored - 1 and syntax.is_encapsulated and syntax != codecs.RLE:
        # A code stream has the values themselves, not words with additional bits.
        raise DataError(f"{path}: {stored} bits stored and high bit {high} contradict each other; correct the header")
    big = syntax == uids.ExplicitVRBigEndian
    start, length, vr = _pixel_element(stream, big, syntax == uids.ImplicitVRLittleEndian, path)
    ranges = None
    if syntax.is_encapsulated:
        if length != 0xFFFFFFFF:
            raise DataError(f"{path}: compressed pixel data without fragments; the file is damaged")
        ranges = _frame_ranges(ds, file, start, count, path)
        if syntax in codecs.JPEG_2000:
            _correct_sign(ds, file.at(int(ranges[0, 0]) + 8, 2**16), path)
    else:
        end = start + frame.nbytes * count
        if length == 0xFFFFFFFF:
            raise DataError(f"{path}: uncompressed pixel data without a length; the file is damaged")
        surplus = length - frame.nbytes * count
        if surplus < 0 or surplus > max(frame.spare * frame.nbytes // (frame.rows * frame.columns), 1):
            raise DataError(
                f"{path}: {length} bytes of pixel data instead of {frame.nbytes * count} for {count} frames of "
                f"{frame.rows} x {frame.columns}; correct the header or fetch the file again"
            )
        if file.deflated is None and end > file.size:
            raise DataError(f"{path}: is truncated ({file.size} of {end} bytes); fetch the file again")
    return StoredFrames.of(
        ds,
        path,
        frame,
        syntax,
        offset=None if syntax.is_encapsulated else start,
        deflated=file.deflated,
        swapped=big and frame.bits_allocated == 8 and vr == b"OW",
        ranges=ranges,
    )


def frame_of(ds: Dataset, path: object) -> codecs.Frame:
    """The format of a frame by the header; `DataError` if it is not supported."""
    stored, allocated, high = int(ds.BitsStored), int(ds.BitsAllocated), _high_bit(ds)
    if allocated not in (8, 16) or not 1 <= stored <= allocated or not stored - 1 <= high < allocated:
        raise DataError(f"{path}: {stored} bits of {allocated}, high bit {high}, is not supported; convert the file")
    if (ds.get("PixelRepresentation") or 0) not in (0, 1):
        raise DataError(f"{path}: PixelRepresentation {ds.PixelRepresentation} must be 0 or 1; correct the header")
    samples, photometric = int(ds.get("SamplesPerPixel", 1)), str(ds.get("PhotometricInterpretation", ""))
    return codecs.Frame(int(ds.Rows), int(ds.Columns), samples, allocated, photometric)


def _high_bit(ds: Dataset) -> int:
    return int(ds.get("HighBit", int(ds.BitsStored) - 1))


def _correct_sign(ds: Dataset, stream: bytes, path: Path) -> None:
    """Correct PixelRepresentation, with a warning, if the JPEG 2000 stream disagrees on signed pixels.

    A stream with more than BitsStored bits has the words in memory, so its sign is ignored.
    """
    sample = codecs.jpeg_2000_sample(stream)
    header = int(ds.get("PixelRepresentation") or 0)
    if sample is None or sample[1] == bool(header) or sample[0] > int(ds.BitsStored):
        return
    ds.PixelRepresentation = int(sample[1])
    kinds = ("unsigned", "signed")
    conflict = f"the header declares {kinds[header]} pixels, but its JPEG 2000 stream {kinds[1 - header]} ones"
    warn_once(f"{path}: {conflict}; using the stream, correct the header")


def _pixel_element(stream: Any, big: bool, implicit: bool, path: Path) -> tuple[int, int, bytes]:
    """The start, length and VR of the value of the pixel data element at the stream's position."""
    order = ">" if big else "<"
    head = stream.read(8)
    if len(head) == 8 and struct.unpack(f"{order}HH", head[:4]) == (0x7FE0, 0x0010):
        if implicit:
            return stream.tell(), struct.unpack(f"{order}I", head[4:])[0], b"OW"
        tail = stream.read(4)
        if head[4:6] in (b"OB", b"OW") and len(tail) == 4:
            return stream.tell(), struct.unpack(f"{order}I", tail)[0], head[4:6]
    raise DataError(f"{path}: has no integer pixel data, or is truncated before them; fetch the file again")


def _frame_ranges(ds: Dataset, file: DicomFile, position: int, frames: int, path: Path) -> np.ndarray:
    """The ranges of frames in the encapsulated pixel data at `position`, by a valid table of offsets or by search.

    The table avoids a search through the whole file, which takes a second for a slide with a million tiles.
    """
    length, position, _ = _item(file, position, path)
    basic = np.frombuffer(file.at(position, min(length, 4 * frames)), "<u4").astype(np.int64)
    position += length
    if position > file.size:
        raise DataError(f"{path}: is truncated or damaged in its pixel data at byte {position}; fetch the file again")
    offsets = _extended_offsets(ds)
    offsets = basic if offsets is None else offsets
    # The basic table overflows beyond 4 GiB.
    good = frames > 1 and len(offsets) == frames and offsets[0] == 0 and bool(np.all(np.diff(offsets) > 0))
    if good and position + offsets[-1] < file.size:
        starts = position + offsets
        last = _search(file, int(starts[-1]), path)
        return np.stack([starts, np.append(starts[1:], last[-1][1])], 1)
    items = np.array(_search(file, position, path), np.int64).reshape(-1, 2)
    if len(items) < frames:
        raise DataError(f"{path}: {len(items)} fragments for {frames} frames of pixel data; fetch the file again")
    if frames == 1:
        return np.array([[items[0, 0], items[-1, 1]]])
    if len(items) == frames:
        return items
    raise DataError(f"{path}: {len(items)} fragments for {frames} frames without a table of offsets; convert it")


def _extended_offsets(ds: Dataset) -> np.ndarray | None:
    data = ds.get("ExtendedOffsetTable")
    return np.frombuffer(data, "<u8").astype(np.int64) if isinstance(data, bytes) and len(data) % 8 == 0 else None


def _search(file: DicomFile, position: int, path: Path) -> list[tuple[int, int]]:
    """(first byte, end) of each item from `position` to the end of the sequence; never empty."""
    items: list[tuple[int, int]] = []
    while True:
        length, start, last = _item(file, position, path)
        if last:
            break
        if start + length > file.size:
            raise DataError(f"{path}: is truncated or damaged in its pixel data at byte {position}; fetch it again")
        if len(items) == _FRAGMENTS:
            raise DataError(f"{path}: has more than {_FRAGMENTS} fragments of pixel data; it is damaged")
        items.append((position, start + length))
        position = start + length
    if not items:
        raise DataError(f"{path}: has no fragment of pixel data at byte {position}; fetch the file again")
    return items


def _item(file: DicomFile, position: int, path: Path) -> tuple[int, int, bool]:
    """Length and first byte of the value of the item at `position`, and whether it is the end of the sequence."""
    head = file.at(position, 8)
    tag, length = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
    if tag not in (_ITEM, _SEQUENCE_END):
        raise DataError(f"{path}: is truncated or damaged in its pixel data at byte {position}; fetch the file again")
    return length, position + 8, tag == _SEQUENCE_END
