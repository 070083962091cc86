"""DICOM images as stored pixels: mammograms for presentation look as on a radiologist's workstation.

Uncompressed frames are read by region from the file; compressed frames are decoded once, in their own dtype, because
their formats lack random access. The frames of a slide (PS3.3 C.8.12.4, C.7.6.17) are the tiles of an image.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue

from ..errors import DataError
from . import codecs, grayscale
from .dicom_file import DicomFile, StoredFrames, frame_of, locate_frames, read_header, without_validation
from .dicomweb import Instance
from .header import UNDECLARED, DicomInfo, describe
from .rawfile import RawPixels, brief, library_errors, warn_once
from .stored import StoredPixels, chosen_plane
from .tiles import TiledPixels, TileGrid
from .volumes import SlicePlace

_SQUARE = 0.001
"""The maximum relative difference of the sides of a square pixel."""
_RGB = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
# A sparse slide with less than this part of its matrix has a damaged header.
_SPARSEST = 1e-4
_PLANES = "focal planes and optical paths"


def open_dicom(
    path: Path, *, voi: str = "auto", frame: int | None = None, for_processing: bool = False
) -> DicomPixels | SlidePixels:
    """Open a frame of a DICOM file, or a slide whose tiles are the frames; arguments as in `open.open_pixels`."""
    return _open(path, voi, frame, for_processing)[0]


def open_frames(path: Path, *, voi: str = "auto", for_processing: bool = False) -> list[DicomPixels]:
    """Open all frames of a DICOM file, in the order of the file; arguments as in `open.open_pixels`."""
    if voi == "minmax":
        raise DataError(f"{path}: voi='minmax' would scale each slice by itself; choose another")
    return _open(path, voi, "all", for_processing)


def _open(path: Path, voi: str, frame: Any, for_processing: bool) -> list[Any]:
    grayscale.check_voi(voi)
    if isinstance(path, Instance) and path.frames > 1:
        ds, frames = locate_in_store(path)
        with without_validation():
            return _open_dataset(ds, path, lambda: frames, voi, frame, for_processing)
    with DicomFile(path) as file, without_validation():
        ds, stream = read_header(file, path)
        return _open_dataset(ds, path, lambda: locate_frames(ds, file, stream, path), voi, frame, for_processing)


def _open_dataset(
    ds: Dataset, path: Path, locate: Callable[[], StoredFrames], voi: str, frame: Any, for_processing: bool
) -> list[Any]:
    """The slide, the frame or, for "all", all frames."""
    info = describe(ds, path)
    with library_errors(f"{path}: malformed DICOM header", "correct it or fetch it again"):
        if info.for_processing and not for_processing:
            raise DataError(
                f"{path}: is a For Processing image (raw detector values); use the For Presentation one, or allow "
                "it with for_processing=True (--for-processing)"
            )
        _warn_of_contradictions(ds, path)
        if info.matrix is not None:
            if frame == "all":
                raise DataError(
                    f"{path}: is a slide, whose frames are the tiles of one image; open it without frame='all'"
                )
            return [SlidePixels(ds, info, locate(), voi=voi, plane=frame)]
        _check(info, int(ds.get("SamplesPerPixel", 1)), 0 if frame == "all" else frame, path)
        located, numbers = locate(), range(info.frames) if frame == "all" else [frame or 0]
        found = [DicomPixels(ds, info, located, voi=voi, frame=number) for number in numbers]
        if frame == "all":
            for number, one in enumerate(found):
                one.place = SlicePlace.of(ds, number)
        return found


def _warn_of_contradictions(ds: Dataset, path: Path) -> None:
    """Warn if PresentationLUTShape contradicts PhotometricInterpretation, or pixels are not square."""
    shape, photometric = str(ds.get("PresentationLUTShape") or ""), str(ds.get("PhotometricInterpretation") or "")
    if (shape, photometric) in (("IDENTITY", "MONOCHROME1"), ("INVERSE", "MONOCHROME2")):
        conflict = f"PresentationLUTShape {shape} and {photometric} contradict each other"
        warn_once(f"{path}: {conflict}; using {photometric}, inspect the image: gigamorph data preview")
    for keyword in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        sides = ds.get(keyword)
        pair = [float(side) for side in sides] if isinstance(sides, MultiValue) and len(sides) == 2 else [1.0, 1.0]
        if min(pair) <= 0 or max(pair) > (1 + _SQUARE) * min(pair):
            sides = f"pixels are not square ({keyword} {pair[0]:g}, {pair[1]:g})"
            warn_once(f"{path}: {sides}; pixels are used as stored, resample the image first")
            return


def _check(info: DicomInfo, samples: int, frame: int | None, path: Path) -> None:
    if info.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        if info.photometric == UNDECLARED:
            raise DataError(f"{path}: has no PhotometricInterpretation; add it: MONOCHROME1 or MONOCHROME2")
        raise DataError(f"{path}: is {brief(info.photometric)}, but must be grey: MONOCHROME1 or MONOCHROME2")
    if samples != 1:
        raise DataError(f"{path}: is {info.photometric} with {samples} samples per pixel, not 1; correct the header")
    chosen_plane(frame, info.frames, str(path), "frames")


class DicomPixels(StoredPixels):
    """Stored pixels (`stored.StoredPixels`) of a frame of a DICOM file; created by `open_dicom`."""

    self_describing = True
    place: SlicePlace | None = None
    """Where a slice of a volume lies; None for images."""

    def __init__(self, ds: Dataset, info: DicomInfo, frames: StoredFrames, *, voi: str, frame: int) -> None:
        self.path, self.name = frames.path, str(frames.path)
        self.info, self.frame, self._frames = info, frame, frames
        self.shape = (1, info.rows, info.columns)
        self.dtype = frames.dtype
        self._lock = threading.Lock()
        self._decoded: np.ndarray | None = None
        self._flips: tuple[bool, bool] | None = None
        self._raw: RawPixels | None = None
        if frames.by_region:
            assert frames.offset is not None
            offset = frames.offset + frame * frames.frame.nbytes
            self._raw = RawPixels(self.path, offset, self.shape[1:], frames.stored_dtype, order=(0, 1))
        self._padding = grayscale.padding_patterns(ds)
        # The smallest and largest pixel are known after reading, which needs the header.
        self._header = ds if voi == "minmax" else None
        self._scale: grayscale.GreyScale | None = None
        if voi != "minmax":
            self._scale = self._build(ds, voi)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_decoded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _decoded=None)

    @property
    def table(self) -> np.ndarray:
        """The grey level of each stored value."""
        return self._grey().table

    @property
    def full(self) -> int:
        """The grey level of white."""
        return self._grey().full

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps from the file to grey values, in order."""
        frames = self._frames
        name = uids.UID(frames.syntax).name
        bits = f"{frames.bits} of {frames.frame.bits_allocated} bits"
        which = f", frame {self.frame} of {frames.count}" if frames.count > 1 else ""
        return (f"DICOM, {name}, {bits}{which}", *self._grey().steps)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Unsigned bit patterns (1, rows, columns), indices into `table`."""
        if self._raw is not None:
            values = self._raw.read(top, bottom, left, right)
            return self._frames.patterns(values)
        with self._lock:
            if self._decoded is None:
                self._decoded = self._checked(self._frames.decode(self.frame))
            return self._decoded[None, top:bottom, left:right]

    def close(self) -> None:
        self._decoded = None
        if self._raw is not None:
            self._raw.close()

    def _checked(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels; `DataError` if different pixels get the same grey, because the header does not fit then."""
        used = slice(int(pixels.min()), int(pixels.max()) + 1)
        blank = self._padding is not None and bool(self._padding[used].all())
        if self._scale is not None and used.stop - used.start > 1 and not blank:
            greys = self._scale.table[used]
            if greys.min() == greys.max():
                raise DataError(f"{self.path}: all pixels get the same grey; it is damaged, or choose another voi")
        return pixels

    @property
    def by_region(self) -> bool:
        return self._raw is not None

    def flips(self) -> tuple[bool, bool]:
        """The mirroring that moves a mammogram's chest wall to the left and its feet down; none for other images."""
        if self._flips is None:
            self._flips = self._find_flips() if self.info.is_mammogram else (False, False)
        return self._flips

    def _find_flips(self) -> tuple[bool, bool]:
        # FieldOfViewHorizontalFlip and FieldOfViewRotation describe earlier changes and are ignored.
        along_row, along_column = self.info.orientation or ("", "")
        upside_down = along_column.startswith("H")
        if along_row[:1] in ("A", "P"):
            return along_row[0] == "P", upside_down
        return self._breast_is_right(), upside_down

    def _breast_is_right(self) -> bool:
        """Whether the right half has more breast: more unpadded pixels, or more grey if no padding is declared."""
        width = self.shape[2]
        weight = self.table.astype(np.float64) if self._padding is None else (~self._padding).astype(np.float64)
        halves = np.zeros(2)
        for values in self._strips():
            halves += weight[values[:, : width // 2]].sum(), weight[values[:, (width + 1) // 2 :]].sum()
        return bool(halves[1] > halves[0])

    def _strips(self) -> Any:
        _, height, width = self.shape
        for top in range(0, height, 256):
            yield self.read(top, min(top + 256, height), 0, width)[0]

    def _grey(self) -> grayscale.GreyScale:
        if self._scale is None:
            assert self._header is not None
            present = np.zeros(2**self._frames.bits, bool)
            for values in self._strips():
                present[values] = True
            self._scale, self._header = self._build(self._header, "minmax", present), None
        return self._scale

    def _build(self, ds: Dataset, voi: str, present: np.ndarray | None = None) -> grayscale.GreyScale:
        for_display = not self.info.for_processing
        with without_validation():
            return grayscale.build(
                ds, voi=voi, frame=self.frame, for_display=for_display, name=self.name, present=present
            )


class SlidePixels(TiledPixels):
    """Stored pixels (`stored.StoredPixels`) of a slide; created by `open_dicom`.

    Missing tiles of a sparse slide are white in colour images and black in grey images.

    Args:
        ds, info: the header and its data.
        frames: the frames of the file.
        voi: the grey scale, as in `open_pixels`.
        plane: the index of focal plane and optical path, focal planes first; required if there are several.
    """

    self_describing = True

    def __init__(self, ds: Dataset, info: DicomInfo, frames: StoredFrames, *, voi: str, plane: int | None) -> None:
        self.path, self.name = frames.path, str(frames.path)
        self.info, self._frames = info, frames
        assert info.matrix is not None
        samples, photometric = frames.frame.samples, info.photometric
        grey = photometric in ("MONOCHROME1", "MONOCHROME2") and samples == 1
        # Codecs return RGB; uncompressed pixels must be RGB already.
        colour = samples == 3 and (photometric == "RGB" or (photometric in _RGB and frames.compressed))
        if not (grey or colour):
            raise DataError(f"{self.path}: {photometric} with {samples} samples is not supported; convert it to RGB")
        self.shape = (samples, *info.matrix)
        self.dtype = frames.dtype
        self.tile_size = (info.rows, info.columns)
        self._index, self.plane, planes = _tile_frames(ds, info, plane, self.name)
        self.full = 2**frames.bits - 1
        self._absent = self.full
        scale: tuple[str, ...] = ()
        if grey:
            if voi == "minmax":
                raise DataError(f"{self.path}: cannot use voi='minmax', which reads the whole slide; choose another")
            for_display = not info.for_processing
            first = self._index if isinstance(self._index, int) else min(self._index.values())
            built = grayscale.build(ds, voi=voi, frame=first, for_display=for_display, name=self.name)
            self.table, self.full, scale = built.table, built.full, built.steps
            self._absent = int(np.argmin(built.table))
        which = f", plane {self.plane} of {planes}" if planes > 1 else ""
        self.steps = (f"DICOM slide, {uids.UID(frames.syntax).name}, {frames.bits} bits{which}", *scale)
        self._grid = TileGrid(self.tile_size)

    def tile(self, row: int, column: int) -> np.ndarray:
        """The pixels (samples, rows, columns) of a frame, as unsigned bit patterns."""
        across = -(-self.shape[2] // self.tile_size[1])
        index = self._index + row * across + column if isinstance(self._index, int) else self._index.get((row, column))
        if index is None:
            return np.full((self.shape[0], *self.tile_size), self._absent, self.dtype)
        pixels = self._frames.decode(index)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _tile_frames(
    ds: Dataset, info: DicomInfo, plane: int | None, name: str
) -> tuple[int | dict[tuple[int, int], int], int, int]:
    """The frame of the first tile, or of each tile by (row, column); the plane; the number of planes."""
    assert info.matrix is not None
    down, across = (-(-side // tile) for side, tile in zip(info.matrix, (info.rows, info.columns), strict=True))
    groups = list(ds.get("PerFrameFunctionalGroupsSequence") or [])
    full = str(ds.get("DimensionOrganizationType") or "") == "TILED_FULL"
    if full or len(groups) != info.frames or not groups[0].get("PlanePositionSlideSequence"):
        count, rest = divmod(info.frames, down * across)
        if rest or not count:
            raise DataError(f"{name}: {info.frames} frames do not fill {down} x {across} tiles; fetch the whole slide")
        chosen = chosen_plane(plane, count, name, _PLANES, "plane")
        return chosen * down * across, chosen, count
    if info.frames * info.rows * info.columns < _SPARSEST * info.matrix[0] * info.matrix[1]:
        raise DataError(f"{name}: {info.frames} frames are too few for {down} x {across} tiles; the header is damaged")
    planes: dict[tuple[str, float], dict[tuple[int, int], int]] = {}
    for number, group in enumerate(groups):
        position = group.PlanePositionSlideSequence[0]
        row, column = (
            int(position.RowPositionInTotalImagePixelMatrix) - 1,
            int(position.ColumnPositionInTotalImagePixelMatrix) - 1,
        )
        if row % info.rows or column % info.columns or not (0 <= row < info.matrix[0] and 0 <= column < info.matrix[1]):
            raise DataError(f"{name}: frame {number} at {row}, {column} is not on the grid of tiles; convert it")
        path = (group.get("OpticalPathIdentificationSequence") or [Dataset()])[0].get("OpticalPathIdentifier")
        depth = float(position.get("ZOffsetInSlideCoordinateSystem") or 0)
        planes.setdefault((str(path or ""), depth), {})[row // info.rows, column // info.columns] = number
    chosen = chosen_plane(plane, len(planes), name, _PLANES, "plane")
    return planes[sorted(planes)[chosen]], chosen, len(planes)


_SOF = {
    0xC0: uids.JPEGBaseline8Bit,
    0xC1: uids.JPEGExtended12Bit,
    0xC3: uids.JPEGLosslessSV1,
    0xF7: uids.JPEGLSLossless,
}


@dataclass(frozen=True)
class StoreFrames(StoredFrames):
    """Frames of an instance in a store.

    A store may send a frame as stored or uncompressed without saying which, so the syntax is detected from the frame.
    """

    @property
    def by_region(self) -> bool:
        return False

    def _pixels(self, index: int) -> np.ndarray:
        data, name = cast(Instance, self.path).frame(index + 1), f"{self.path}/frames/{index + 1}"
        syntax = syntax_of(data, self.frame, name)
        if syntax.is_encapsulated != self.compressed:
            raise DataError(f"{name}: its store sends only some frames compressed; download the file")
        if syntax.is_encapsulated:
            return codecs.decode(data, syntax, self.frame, name)
        pixels = np.frombuffer(data, self.stored_dtype, self.frame.nbytes // self.dtype.itemsize)
        return self._shaped(pixels)


def syntax_of(data: bytes, frame: codecs.Frame, name: str) -> uids.UID:
    """The transfer syntax of a frame that a store sends without one, or another syntax with the same decoder.

    Raises:
        DataError: if the syntax is unknown, or the size differs from the header.
    """
    size = frame.rows, frame.columns, frame.samples
    if data[:3] == b"\xff\xd8\xff" and codecs.jpeg_size(data) == size:
        return _SOF.get(codecs.jpeg_process(data) or 0, uids.JPEGLossless)
    if (data[:4] == b"\xff\x4f\xff\x51" or data[4:8] == b"jP  ") and codecs.jpeg_2000_size(data) == size:
        return uids.JPEG2000Lossless
    if frame.nbytes <= len(data) <= frame.nbytes + 1:
        return uids.ExplicitVRLittleEndian
    if data[:8] == struct.pack("<2I", frame.samples * frame.bits_allocated // 8, 64):
        return uids.RLELossless
    raise DataError(
        f"{name}: {len(data)} bytes from its store are not a frame of {frame.rows} x {frame.columns} pixels with "
        f"{frame.samples} samples; download the file"
    )


def locate_in_store(instance: Instance) -> tuple[Dataset, StoreFrames]:
    """The header of a multi-frame instance and its frames; downloads the first frame to detect the syntax.

    Raises:
        DataError: if the store's metadata is incomplete, or frames cannot be downloaded separately.
    """
    ds = instance.header
    with without_validation(), library_errors(f"{instance}: its store's metadata lacks the size", "download the file"):
        frame = frame_of(ds, instance)
    first = instance.frame(1)
    syntax = syntax_of(first, frame, f"{instance}/frames/1")
    lossy = syntax in (uids.JPEGBaseline8Bit, uids.JPEGExtended12Bit)
    if lossy and (codecs.jpeg_bits(first) < int(ds.BitsStored) or str(ds.get("LossyImageCompression", "")) == "00"):
        raise DataError(f"{instance}: its store sends frames with additional lossy compression; download the file")
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    with library_errors(f"{instance}: its store's metadata cannot be read", "download the file"):
        return ds, StoreFrames.of(ds, cast(Path, instance), frame, syntax)
