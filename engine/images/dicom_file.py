"""DICOM files: the header, and where the frames lie in the file (PS3.5 A.4, PS3.10 7).

Nothing is trusted: lengths are checked against the file before they are read or allocated, a deflated file is inflated
no further than its header says that pixels go, and what ends early is an error that names the file.
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
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from ..errors import DataError
from . import codecs
from .rawfile import FileBytes, one_line, warn_once

# A deflated header is looked for in this many inflated bytes; images' headers have kilobytes.
_INFLATED_HEADER = 16 * 2**20
# Empty fragments would make the search for frames as long as the file.
_FRAGMENTS = 2**20
_ITEM, _SEQUENCE_END = 0xE000FFFE, 0xE0DDFFFE


_quiet = threading.RLock()


def _after_fork() -> None:
    """A lock that another thread held stays locked in a forked process."""
    global _quiet
    _quiet = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def quietly() -> Iterator[None]:
    """While elements are read: pydicom would warn of odd values and print them, patients' identifiers too.

    Its setting is one for the process; the lock keeps two threads from restoring each other's.
    """
    with _quiet, disable_value_validation():
        yield


class DicomFile(io.BufferedReader):
    """A file open for pydicom: no read asks for more memory than the file has bytes, and pydicom inflates nothing.

    `deflated` is where, if at all, a deflate stream starts.
    """

    deflated: int | None = None

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
            raise DataError(f"{path}: is no regular file; name an image")
        self.path = path
        try:
            self._bytes: Any = path.open("rb", buffering=0)
            super().__init__(self._bytes)
            self.size = self.seek(0, 2)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        self.seek(0)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # pydicom would inflate all of it, without a limit
            raise DataError(f"{self.path}: is deflated behind an unusual header; save it uncompressed")
        if size > 2**16:
            size = min(size, max(0, self.size - self.tell()))
        return super().read(size)

    def at(self, place: int, count: int) -> bytes:
        """`count` bytes from a byte on, fewer where the file ends; only these are read."""
        self._bytes.seek(place)
        return self._bytes.read(count) or b""


def read_header(file: DicomFile, path: Path) -> tuple[Dataset, io.BufferedIOBase]:
    """The data set up to the pixels, and the stream that stands at the pixel data element behind it."""
    try:
        stream = _inflated_header(file, path)
        ds = dcmread(stream, stop_before_pixels=True, force=stream is not file)
        if stream is not file:
            ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        missing = [key for key in ("Rows", "Columns", "BitsAllocated", "BitsStored") if ds.get(key) is None]
        index = ds.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
    except DataError:
        raise
    except Exception as error:  # a damaged header shows in errors of every kind
        raise DataError(
            f"{path}: damaged or truncated DICOM header ({one_line(error)}); fetch the file again"
        ) from error
    if missing and index:
        raise DataError(f"{path}: is a DICOMDIR, the index of a medium, no image; name the folder of its images")
    if missing:
        raise DataError(f"{path}: has no {missing[0]} in its header: no image, or truncated; fetch the file again")
    return ds, stream


def _inflated_header(file: DicomFile, path: Path) -> io.BufferedIOBase:
    """The file, or the first part of what it inflates to, which starts at the data set."""
    head = file.read(4096)
    file.seek(0)
    if DeflatedExplicitVRLittleEndian.encode() not in head:
        return file
    # The first element of the meta information is its length (PS3.10 7.1).
    if head[128:140] != b"DICM\2\0\0\0UL\4\0" or len(head) < 144:
        raise DataError(f"{path}: damaged or truncated DICOM header; fetch the file again")
    file.deflated = 144 + struct.unpack("<I", head[140:144])[0]
    return io.BytesIO(_inflate(path, file.deflated, _INFLATED_HEADER))


def _inflate(path: Path, start: int, count: int, skip: int = 0) -> bytearray:
    """`count` bytes of the deflate stream at byte `start`, after the first `skip`; fewer where it ends.

    Nothing but these is held.
    """
    stream, done, found = zlib.decompressobj(-zlib.MAX_WBITS), 0, bytearray()
    with path.open("rb") as file:
        file.seek(start)
        while len(found) < count and not stream.eof and (data := file.read(2**20)):
            part = b"more"
            # Output may be left when all input is taken, and input when the stream has ended.
            while (data or part) and len(found) < count and not stream.eof:
                part = stream.decompress(data, min(skip + count - done, 2**20))
                found += memoryview(part)[max(skip - done, 0) :]
                done += len(part)
                data = stream.unconsumed_tail
    return found


@dataclass(frozen=True)
class StoredFrames:
    """The frames of a DICOM file and where they lie."""

    path: Path
    syntax: str
    frame: codecs.Frame
    count: int
    planar: bool
    """Colour plane by plane rather than pixel by pixel; uncompressed frames only."""
    shift: int
    """Bits below the lowest stored one."""
    bits: int
    """BitsStored."""
    signed: bool
    """PixelRepresentation: the highest stored bit is the sign."""
    offset: int | None
    """Of the first frame, uncompressed: in the file, or in what the file inflates to."""
    deflated: int | None
    """Where the deflate stream starts in the file."""
    swapped: bool
    """8-bit pixels in big-endian words."""
    ranges: np.ndarray | None
    """int64 (count, 2), compressed: first byte and end of each frame's items in the file."""

    @property
    def dtype(self) -> np.dtype:
        """Of decoded frames."""
        return np.dtype(np.uint8 if self.frame.bits_allocated == 8 else np.uint16)

    @property
    def stored_dtype(self) -> np.dtype:
        """Of uncompressed frames as they lie in the file."""
        return self.dtype.newbyteorder(">" if self.syntax == ExplicitVRBigEndian else "<")

    @property
    def compressed(self) -> bool:
        return UID(self.syntax).is_encapsulated

    @property
    def by_region(self) -> bool:
        """Whether a part of a frame can be read without the rest."""
        return self.offset is not None and self.deflated is None and not self.swapped and not self.planar

    def decode(self, index: int) -> np.ndarray:
        """A frame as unsigned bit patterns: `frame.shape`, each of BitsStored bits, writable."""
        pixels = self._pixels(index)
        if pixels.shape != self.frame.shape:
            raise DataError(
                f"{self.path}: decodes to {pixels.shape}, the header says {self.frame.shape}; it is damaged"
            )
        if pixels.dtype.kind not in "ui" or not self.bits <= 8 * pixels.dtype.itemsize <= 16:
            raise DataError(f"{self.path}: decodes to {pixels.dtype}, {self.bits} bits expected; it is damaged")
        if pixels.dtype.kind == "i":  # the same bits, as the table wants them
            pixels = pixels.view(pixels.dtype.str.replace("i", "u"))
        pixels = pixels.astype(self.dtype, copy=False)
        # Uncompressed pixels and RLE keep what else stands in a word; in other code streams it would be pixel values.
        used = int(pixels.max()).bit_length() - self.shift
        if used > self.bits and not self.signed and self.compressed and self.syntax != codecs.RLE:
            raise DataError(f"{self.path}: pixels have {used} bits, BitsStored says {self.bits}; correct the header")
        return self.patterns(pixels if pixels.flags.writeable else pixels.copy())

    def patterns(self, values: np.ndarray) -> np.ndarray:
        """The BitsStored bits of each value, in place: those above hold overlays, copies of the sign or garbage."""
        if self.shift:
            np.right_shift(values, self.shift, out=values)
        if self.bits < 8 * values.dtype.itemsize:
            np.bitwise_and(values, values.dtype.type(2**self.bits - 1), out=values)
        return values

    def _pixels(self, index: int) -> np.ndarray:
        if self.offset is not None:
            return self._uncompressed(index)
        if codecs.is_known(self.syntax):
            return codecs.decode(self._data(index), self.syntax, self.frame, str(self.path))
        return self._by_pydicom(index)

    def _data(self, index: int) -> bytes:
        """The code stream of a frame: the values of its items, put together."""
        assert self.ranges is not None
        start, end = (int(place) for place in self.ranges[index])
        if end - start > codecs.most_encoded(self.frame.nbytes):
            sizes = f"{end - start} bytes for {self.frame.nbytes} bytes of pixels"
            raise DataError(f"{self.path}: frame {index} has {sizes}; it is damaged")
        data, place, parts = FileBytes(self.path).read(start, end - start), 0, []
        while place < len(data):
            tag, length = struct.unpack("<II", data[place : place + 8]) if place + 8 <= len(data) else (0, 0)
            if tag != _ITEM or place + 8 + length > len(data):
                raise DataError(f"{self.path}: frame {index} is damaged at byte {start + place}; fetch the file again")
            parts.append(data[place + 8 : place + 8 + length])
            place += 8 + length
        return b"".join(parts)

    def _uncompressed(self, index: int) -> np.ndarray:
        assert self.offset is not None
        size = self.frame.nbytes
        start = self.offset + index * size
        odd = start % 2 if self.swapped else 0  # from a whole word to a whole word
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
        """Uncompressed pixels of a frame, as `frame.shape`."""
        frame = self.frame
        if self.planar:
            return pixels.reshape(frame.samples, frame.rows, frame.columns).transpose(1, 2, 0)
        return pixels.reshape(frame.shape)

    def _by_pydicom(self, index: int) -> np.ndarray:
        codecs.check_size(self.frame.nbytes, self.path.stat().st_size, str(self.path))
        try:
            with DicomFile(self.path) as file:
                ds, _ = read_header(file, self.path)
            # All bits as they are: pydicom would interpret signs and unused bits, and the table does that here.
            ds.BitsStored, ds.HighBit, ds.PixelRepresentation = ds.BitsAllocated, ds.BitsAllocated - 1, 0
            ds.NumberOfFrames, ds.PixelData = 1, encapsulate([self._data(index)], has_bot=False)
            return pixel_array(ds, raw=True)
        except DataError:
            raise
        except Exception as error:  # missing plugin, damaged data: pydicom raises errors of every kind
            raise DataError(f"{self.path}: pixel data cannot be decoded ({one_line(error)}); convert it") from error


def locate_frames(ds: Dataset, file: DicomFile, stream: Any, path: Path) -> StoredFrames:
    """Where the frames are; `stream` stands where `read_header` left it. `DataError` if the file is too short."""
    syntax = UID(str(ds.file_meta.TransferSyntaxUID))
    stored, allocated = int(ds.BitsStored), int(ds.BitsAllocated)
    high, count = int(ds.get("HighBit", stored - 1)), int(ds.get("NumberOfFrames") or 1)
    if allocated not in (8, 16) or not 1 <= stored <= allocated or not stored - 1 <= high < allocated:
        raise DataError(f"{path}: {stored} bits of {allocated}, high bit {high}, is not supported; convert the file")
    if (ds.get("PixelRepresentation") or 0) not in (0, 1):
        raise DataError(f"{path}: PixelRepresentation {ds.PixelRepresentation} is neither 0 nor 1; correct the header")
    if high != stored - 1 and syntax.is_encapsulated and syntax != codecs.RLE:
        # A code stream holds the values themselves, not words with room for more.
        raise DataError(f"{path}: {stored} bits stored and high bit {high} contradict each other; correct the header")
    samples, photometric = int(ds.get("SamplesPerPixel", 1)), str(ds.get("PhotometricInterpretation", ""))
    frame = codecs.Frame(int(ds.Rows), int(ds.Columns), samples, allocated, photometric)
    big = syntax == ExplicitVRBigEndian
    place, length, vr = _pixel_element(stream, big, syntax == ImplicitVRLittleEndian, path)
    ranges = None
    if syntax.is_encapsulated:
        if length != 0xFFFFFFFF:
            raise DataError(f"{path}: compressed pixel data without fragments; the file is damaged")
        ranges = _frame_ranges(ds, file, place, count, path)
        if syntax in codecs.JPEG_2000:
            _believe_sign(ds, file.at(int(ranges[0, 0]) + 8, 2**16), path)
    else:
        end = place + frame.nbytes * count
        if length == 0xFFFFFFFF:
            raise DataError(f"{path}: uncompressed pixel data without a length; the file is damaged")
        surplus = length - frame.nbytes * count
        if surplus < 0 or surplus > max(frame.spare * frame.nbytes // (frame.rows * frame.columns), 1):
            raise DataError(
                f"{path}: {length} bytes of pixel data, {frame.nbytes * count} expected for {count} frames of "
                f"{frame.rows} x {frame.columns}; correct the header or fetch the file again"
            )
        if file.deflated is None and end > file.size:
            raise DataError(f"{path}: is truncated ({file.size} of {end} bytes); fetch the file again")
    return StoredFrames(
        path=path,
        syntax=str(syntax),
        frame=frame,
        count=count,
        planar=samples > 1 and not syntax.is_encapsulated and int(ds.get("PlanarConfiguration") or 0) == 1,
        shift=high + 1 - stored,
        bits=stored,
        signed=bool(ds.get("PixelRepresentation", 0)),
        offset=None if syntax.is_encapsulated else place,
        deflated=file.deflated,
        swapped=big and allocated == 8 and vr == b"OW",
        ranges=ranges,
    )


def _believe_sign(ds: Dataset, stream: bytes, path: Path) -> None:
    """Correct a header that says otherwise than its JPEG 2000 stream whether pixels are signed; warns of it.

    A stream of more bits than are stored holds words as they are in memory, whatever their sign.
    """
    sample = codecs.jpeg_2000_sample(stream)
    header = int(ds.get("PixelRepresentation") or 0)
    if sample is None or sample[1] == bool(header) or sample[0] > int(ds.BitsStored):
        return
    ds.PixelRepresentation = int(sample[1])
    kinds = ("unsigned", "signed")
    conflict = f"the header says {kinds[header]} pixels, its JPEG 2000 stream {kinds[1 - header]} ones"
    warn_once(f"{path}: {conflict}; the stream is believed, correct the header")


def _pixel_element(stream: Any, big: bool, implicit: bool, path: Path) -> tuple[int, int, bytes]:
    """Where the value of the pixel data element at the stream's position starts, its length and its VR."""
    order = ">" if big else "<"
    head = stream.read(8)
    if len(head) == 8 and struct.unpack(f"{order}HH", head[:4]) == (0x7FE0, 0x0010):
        if implicit:
            return stream.tell(), struct.unpack(f"{order}I", head[4:])[0], b"OW"
        tail = stream.read(4)
        if head[4:6] in (b"OB", b"OW") and len(tail) == 4:
            return stream.tell(), struct.unpack(f"{order}I", tail)[0], head[4:6]
    raise DataError(f"{path}: has no integer pixel data, or is truncated before them; fetch the file again")


def _frame_ranges(ds: Dataset, file: DicomFile, place: int, frames: int, path: Path) -> np.ndarray:
    """Of encapsulated pixel data that start at `place`: by a table of offsets if there is a good one, else by search.

    A table spares the search through the whole file, which takes a second on a slide of a million tiles.
    """
    length, place, _ = _item(file, place, path)
    basic = np.frombuffer(file.at(place, min(length, 4 * frames)), "<u4").astype(np.int64)
    place += length
    if place > file.size:
        raise DataError(f"{path}: is truncated or damaged in its pixel data at byte {place}; fetch the file again")
    offsets = _extended_offsets(ds)
    offsets = basic if offsets is None else offsets
    # Beyond 4 GiB the basic table wraps around.
    good = frames > 1 and len(offsets) == frames and offsets[0] == 0 and bool(np.all(np.diff(offsets) > 0))
    if good and place + offsets[-1] < file.size:
        starts = place + offsets
        last = _search(file, int(starts[-1]), path)
        return np.stack([starts, np.append(starts[1:], last[-1][1])], 1)
    items = np.array(_search(file, place, path), np.int64).reshape(-1, 2)
    if len(items) < frames:
        raise DataError(f"{path}: {len(items)} fragments for {frames} frames of pixel data; fetch the file again")
    if frames == 1:
        return np.array([[items[0, 0], items[-1, 1]]])
    if len(items) == frames:
        return items
    raise DataError(f"{path}: {len(items)} fragments for {frames} frames and no table of offsets; convert it")


def _extended_offsets(ds: Dataset) -> np.ndarray | None:
    data = ds.get("ExtendedOffsetTable")
    return np.frombuffer(data, "<u8").astype(np.int64) if isinstance(data, bytes) and len(data) % 8 == 0 else None


def _search(file: DicomFile, place: int, path: Path) -> list[tuple[int, int]]:
    """(first byte, end) of each item from `place` to the end of the sequence; never empty."""
    items: list[tuple[int, int]] = []
    while True:
        length, start, last = _item(file, place, path)
        if last:
            break
        if start + length > file.size:
            raise DataError(f"{path}: is truncated or damaged in its pixel data at byte {place}; fetch the file again")
        if len(items) == _FRAGMENTS:
            raise DataError(f"{path}: has more than {_FRAGMENTS} fragments of pixel data; it is damaged")
        items.append((place, start + length))
        place = start + length
    if not items:
        raise DataError(f"{path}: has no fragment of pixel data at byte {place}; fetch the file again")
    return items


def _item(file: DicomFile, place: int, path: Path) -> tuple[int, int, bool]:
    """Length and first byte of the value of the item at `place`, and whether it is the end of the sequence instead."""
    head = file.at(place, 8)
    tag, length = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
    if tag not in (_ITEM, _SEQUENCE_END):
        raise DataError(f"{path}: is truncated or damaged in its pixel data at byte {place}; fetch the file again")
    return length, place + 8, tag == _SEQUENCE_END
