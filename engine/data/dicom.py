"""DICOM images as stored pixels: mammograms for presentation come out as the radiologist sees them.

Uncompressed frames are read by region from their place in the file; compressed ones are decoded once, in their own
dtype, because their formats have no random access. Nothing is trusted: lengths are checked against the file, and what
ends early or decodes to another size is an error that names the file, never a black image.
"""

from __future__ import annotations

import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import pixel_array
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from ..errors import DataError
from . import codecs, grayscale
from .rawfile import FileBytes, RawPixels, one_line

MG_FOR_PRESENTATION = "1.2.840.10008.5.1.4.1.1.1.2"
_FOR_PROCESSING = {"1.2.840.10008.5.1.4.1.1.1.2.1", "1.2.840.10008.5.1.4.1.1.13.1.5", "1.2.840.10008.5.1.4.1.1.1.1.1"}

# ViewCodeSequence (CID 4014), SNOMED CT and the older SNOMED RT codes.
_VIEW_CODES = {
    **dict.fromkeys(("399162004", "R-10242"), "CC"),
    **dict.fromkeys(("399368009", "R-10226"), "MLO"),
    **dict.fromkeys(("399260004", "R-10224"), "ML"),
    **dict.fromkeys(("399352003", "R-10228"), "LM"),
    **dict.fromkeys(("399099002", "R-10230"), "LMO"),
    **dict.fromkeys(("399196006", "R-10244"), "FB"),
    **dict.fromkeys(("399192008", "R-1024A"), "XCCL"),
    **dict.fromkeys(("399101009", "R-1024B"), "XCCM"),
    **dict.fromkeys(("399188001", "R-102D0"), "SIO"),
    **dict.fromkeys(("441555000", "R-40AAA"), "ISO"),
}
_VIEWS = {*_VIEW_CODES.values(), "XCC", "AT", "SPECIMEN"}
_IN_WORDS = re.compile(r"\b([LR])[ _-]?(CC|MLO|ML|LMO|LM|XCCL|XCCM)\b")


@dataclass(frozen=True)
class DicomInfo:
    """What a DICOM header says about an image; None where it says nothing."""

    rows: int
    columns: int
    frames: int
    bits_stored: int
    transfer_syntax: str
    sop_class: str
    modality: str | None
    patient_id: str | None
    study_uid: str | None
    laterality: str | None
    """L or R."""
    view: str | None
    """CC, MLO, ML, ... as in ViewPosition."""
    orientation: tuple[str, str] | None
    """Where columns and rows go to, as in PatientOrientation: ("A", "F") is anterior to the right, feet below."""
    spacing: tuple[float, float] | None
    """Millimetres between rows and between columns, at the detector unless the file is calibrated."""
    photometric: str
    for_processing: bool
    """Raw detector values, not meant for display."""

    @property
    def is_mammogram(self) -> bool:
        """Whether the chest wall has a side: modality MG, or a view that only mammograms have."""
        return self.modality == "MG" or self.view in _VIEWS


def read_info(path: str | Path) -> DicomInfo:
    """The header of a DICOM file; the pixels are not read. `DataError` if it is missing, damaged or no image."""
    path = Path(path)
    with _open(path) as file:
        return _info(_header(file, path), path)


class DicomPixels:
    """Stored pixels (`pixels.StoredPixels`) of one frame of a DICOM file; arguments as in `pixels.open_pixels`."""

    def __init__(
        self, path: str | Path, *, voi: str = "auto", frame: int | None = None, for_processing: bool = False
    ) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._lock = threading.Lock()
        self._decoded: np.ndarray | None = None
        self._flips: tuple[bool, bool] | None = None
        try:
            with _open(self.path) as file:
                ds = _header(file, self.path)
                self.info = _info(ds, self.path)
                self._check(ds, frame, for_processing)
                self.frame = frame or 0
                self.shape = (1, self.info.rows, self.info.columns)
                self._bits = self.info.bits_stored
                self._shift = int(ds.get("HighBit", self._bits - 1)) + 1 - self._bits
                allocated = int(ds.BitsAllocated)
                self._stored_dtype = np.dtype(np.uint8 if allocated == 8 else np.uint16)
                self._raw, self._fragments = self._locate(file, allocated)
            for_display = not self.info.for_processing
            self.table, self.full = grayscale.build_table(
                ds, voi=voi, frame=self.frame, for_display=for_display, name=self.name
            )
            self._padding = grayscale.padding_patterns(ds)
        except DataError:
            raise
        except Exception as error:  # pydicom converts elements when they are used, and says in many ways that it cannot
            raise DataError(
                f"{path}: malformed DICOM header ({one_line(error)}); correct it or fetch it again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_decoded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _decoded=None)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Unsigned bit patterns (1, rows, columns), indices into `table`."""
        if self._raw is not None:
            values = self._raw.read(top, bottom, left, right)
        else:
            with self._lock:
                if self._decoded is None:
                    self._decoded = self._decode()
            values = self._decoded[None, top:bottom, left:right]
        # Bits above HighBit hold overlays, copies of the sign or garbage.
        if self._shift:
            values = values >> self._shift
        if self._bits < 8 * values.dtype.itemsize:
            values = values & values.dtype.type(2**self._bits - 1)
        return values

    def flips(self) -> tuple[bool, bool]:
        """What brings a mammogram's chest wall to the left and its feet down; nothing for other images."""
        if self._flips is None:
            self._flips = self._find_flips() if self.info.is_mammogram else (False, False)
        return self._flips

    def _find_flips(self) -> tuple[bool, bool]:
        along_row, along_column = self.info.orientation or ("", "")
        upside_down = along_column.startswith("H")
        if along_row[:1] in ("A", "P"):
            return along_row[0] == "P", upside_down
        return self._breast_is_right(), upside_down

    def _breast_is_right(self) -> bool:
        """Which half holds more breast: pixels that are not padding, or more grey where no padding is declared."""
        _, height, width = self.shape
        weight = self.table.astype(np.float64) if self._padding is None else (~self._padding).astype(np.float64)
        halves = np.zeros(2)
        for top in range(0, height, 256):
            for half, (left, right) in enumerate(((0, width // 2), ((width + 1) // 2, width))):
                halves[half] += weight[self.read(top, min(top + 256, height), left, right)].sum()
        return bool(halves[1] > halves[0])

    def _check(self, ds: Dataset, frame: int | None, for_processing: bool) -> None:
        info, path = self.info, self.path
        if info.for_processing and not for_processing:
            raise DataError(f"{path}: is a For Processing image (raw detector values); use the For Presentation one")
        if info.photometric not in ("MONOCHROME1", "MONOCHROME2") or int(ds.get("SamplesPerPixel", 1)) != 1:
            raise DataError(f"{path}: is {info.photometric}, not grey; only MONOCHROME1 and MONOCHROME2 are read")
        allocated, stored = int(ds.BitsAllocated), info.bits_stored
        high = int(ds.get("HighBit", stored - 1))
        if allocated not in (8, 16) or not 1 <= stored <= allocated or not stored - 1 <= high < allocated:
            raise DataError(
                f"{path}: {stored} bits of {allocated}, high bit {high}, is not supported; convert the file"
            )
        if frame is None and info.frames > 1:
            raise DataError(f"{path}: has {info.frames} frames; say which one (frame=0 to {info.frames - 1})")
        if frame is not None and not 0 <= frame < info.frames:
            raise DataError(f"{path}: frame {frame} is wanted, the file has 0 to {info.frames - 1}")

    def _locate(self, file: BinaryIO, allocated: int) -> tuple[RawPixels | None, list[tuple[int, int]]]:
        """Where the frame lies: a region reader if uncompressed, else (offset, length) of its fragments."""
        syntax = UID(self.info.transfer_syntax)
        if syntax == DeflatedExplicitVRLittleEndian:
            return None, []  # no offsets in there; pydicom inflates the file
        big = syntax == ExplicitVRBigEndian
        offset, length = _pixel_element(file, big, syntax == ImplicitVRLittleEndian, self.path)
        if syntax.is_compressed:
            if length != 0xFFFFFFFF:
                raise DataError(f"{self.path}: compressed pixel data without fragments; the file is damaged")
            return None, _frame_fragments(file, offset, self.info.frames, self.frame, self.path)
        size = self.info.rows * self.info.columns * allocated // 8
        if length == 0xFFFFFFFF or length < size * self.info.frames:
            raise DataError(f"{self.path}: {length} bytes of pixel data, {size * self.info.frames} expected")
        if big and allocated == 8:
            return None, []  # bytes are swapped in pairs; pydicom knows
        dtype = np.dtype(np.uint8 if allocated == 8 else ">u2" if big else "<u2")
        shape = (self.info.rows, self.info.columns)
        return RawPixels(self.path, offset + self.frame * size, shape, dtype, order=(0, 1)), []

    def _decode(self) -> np.ndarray:
        syntax = self.info.transfer_syntax
        if codecs.is_known(syntax):
            file = FileBytes(self.path)
            data = b"".join(file.read(offset, length) for offset, length in self._fragments)
            pixels = codecs.decode(data, syntax, self.shape[1:], self.name)
        else:
            try:
                ds = dcmread(self.path)
                # All bits as they are: pydicom would interpret signs and unused bits, and the table does that here.
                ds.BitsStored, ds.HighBit, ds.PixelRepresentation = ds.BitsAllocated, ds.BitsAllocated - 1, 0
                pixels = pixel_array(ds, index=self.frame, raw=True)
            except Exception as error:  # missing plugin, damaged data: pydicom raises errors of every kind
                raise DataError(f"{self.path}: pixel data cannot be decoded ({one_line(error)}); convert it") from error
        if pixels.shape != self.shape[1:]:
            raise DataError(f"{self.path}: decodes to {pixels.shape}, the header says {self.shape[1:]}; it is damaged")
        if pixels.dtype.kind not in "ui" or pixels.dtype.itemsize > 2:
            raise DataError(f"{self.path}: decodes to {pixels.dtype}, 8 or 16 bits expected; it is damaged")
        if pixels.dtype.kind == "i":  # the same bits, as the table wants them
            pixels = pixels.view(pixels.dtype.str.replace("i", "u"))
        return pixels.astype(self._stored_dtype, copy=False)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _header(file: BinaryIO, path: Path) -> Dataset:
    """The data set up to the pixels; `file` is left at the pixel data element."""
    try:
        ds = dcmread(file, stop_before_pixels=True)
        missing = [key for key in ("Rows", "Columns", "BitsAllocated", "BitsStored") if ds.get(key) is None]
    except Exception as error:  # a damaged header shows in errors of every kind
        raise DataError(
            f"{path}: damaged or truncated DICOM header ({one_line(error)}); fetch the file again"
        ) from error
    if missing:
        raise DataError(f"{path}: has no {missing[0]} in its header: no image, or truncated; fetch the file again")
    return ds


def _info(ds: Dataset, path: Path) -> DicomInfo:
    try:
        syntax = ds.file_meta.TransferSyntaxUID
        sop_class = str(ds.get("SOPClassUID", ""))
        laterality, view = _side_and_view(ds)
        orientation = ds.get("PatientOrientation") or None
        spacing = ds.get("PixelSpacing") or ds.get("ImagerPixelSpacing") or None
        intent = str(ds.get("PresentationIntentType") or "")
        info = DicomInfo(
            rows=int(ds.Rows),
            columns=int(ds.Columns),
            frames=int(ds.get("NumberOfFrames") or 1),
            bits_stored=int(ds.BitsStored),
            transfer_syntax=str(syntax),
            sop_class=sop_class,
            modality=_text(ds.get("Modality")),
            patient_id=_text(ds.get("PatientID")),
            study_uid=_text(ds.get("StudyInstanceUID")),
            laterality=laterality,
            view=view,
            orientation=(str(orientation[0]), str(orientation[1])) if orientation and len(orientation) == 2 else None,
            spacing=(float(spacing[0]), float(spacing[1])) if spacing and len(spacing) == 2 else None,
            photometric=_text(ds.get("PhotometricInterpretation")) or "not declared",
            for_processing=sop_class in _FOR_PROCESSING or intent.upper() == "FOR PROCESSING",
        )
    except Exception as error:  # as in DicomPixels
        raise DataError(f"{path}: malformed DICOM header ({one_line(error)}); correct it or fetch it again") from error
    if info.rows < 1 or info.columns < 1 or info.frames < 1:
        raise DataError(f"{path}: {info.frames} frames of {info.rows} x {info.columns} pixels; the header is damaged")
    return info


def _text(value: Any) -> str | None:
    """In one line; None if there is none."""
    return " ".join(str(value).split()) or None if value is not None else None


def _side_and_view(ds: Dataset) -> tuple[str | None, str | None]:
    """L or R, and the view: from their own elements, else from the codes, else from what descriptions say."""
    anatomy = grayscale.functional_group(ds, "FrameAnatomySequence", 0)
    sides = [ds.get("ImageLaterality"), ds.get("Laterality"), anatomy.get("FrameLaterality")]
    side = next((str(value).strip().upper() for value in sides if str(value or "").strip().upper() in ("L", "R")), None)
    position = (_text(ds.get("ViewPosition")) or "").upper()
    view = position if position in _VIEWS else None
    if view is None and ds.get("ViewCodeSequence"):
        view = _VIEW_CODES.get(str(ds.ViewCodeSequence[0].get("CodeValue", "")))
    for text in (position, (_text(ds.get("SeriesDescription")) or "").upper()):
        words = _IN_WORDS.search(text)
        if words:
            side, view = side or words[1], view or words[2]
    return side, view or position or None


def _pixel_element(file: BinaryIO, big: bool, implicit: bool, path: Path) -> tuple[int, int]:
    """Where the value of the pixel data element at the file's position starts, and its length."""
    order = ">" if big else "<"
    head = file.read(8)
    if len(head) == 8:
        group, element = struct.unpack(f"{order}HH", head[:4])
        if (group, element) == (0x7FE0, 0x0010):
            if implicit:
                return file.tell(), struct.unpack(f"{order}I", head[4:])[0]
            tail = file.read(4)
            if head[4:6] in (b"OB", b"OW") and len(tail) == 4:
                return file.tell(), struct.unpack(f"{order}I", tail)[0]
    raise DataError(f"{path}: has no integer pixel data, or is truncated before them; fetch the file again")


def _frame_fragments(file: BinaryIO, offset: int, frames: int, frame: int, path: Path) -> list[tuple[int, int]]:
    """(offset, length) in the file of the fragments of one frame of encapsulated pixel data (PS3.5 A.4)."""
    items: list[tuple[int, int]] = []
    file.seek(0, 2)
    size = file.tell()
    place = offset
    while True:
        file.seek(place)
        head = file.read(8)
        tag, length = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
        if tag == 0xE0DDFFFE:
            break
        if tag != 0xE000FFFE or place + 8 + length > size:
            raise DataError(f"{path}: is truncated or damaged in its pixel data at byte {place}; fetch the file again")
        items.append((place + 8, length))
        place += 8 + length
    table, fragments = items[:1], items[1:]
    if not table or len(fragments) < frames:
        raise DataError(f"{path}: {len(fragments)} fragments for {frames} frames of pixel data; fetch the file again")
    if frames == 1:
        return fragments
    if len(fragments) == frames:
        return [fragments[frame]]
    file.seek(table[0][0])
    offsets = np.frombuffer(file.read(table[0][1]), "<u4").astype(np.int64)
    if len(offsets) != frames:
        raise DataError(f"{path}: {len(fragments)} fragments for {frames} frames and no table of offsets; convert it")
    starts = offsets + fragments[0][0]  # both count from the first fragment, whose item header is 8 bytes before it
    end = starts[frame + 1] if frame + 1 < frames else place + 8
    return [item for item in fragments if starts[frame] <= item[0] < end]
