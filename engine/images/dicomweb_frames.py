"""Frames of an instance in a DICOMweb store, each downloaded when it is read: tiles of slides, slices of volumes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ..errors import DataError
from . import codecs
from .dicom_file import StoredFrames, frame_of, without_validation
from .dicomweb import Instance
from .rawfile import library_errors

_SOF = {0xC0: JPEGBaseline8Bit, 0xC1: JPEGExtended12Bit, 0xC3: JPEGLosslessSV1, 0xF7: JPEGLSLossless}


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


def syntax_of(data: bytes, frame: codecs.Frame, name: str) -> UID:
    """The transfer syntax of a frame that a store sends without one, or another syntax with the same decoder.

    Raises:
        DataError: if the syntax is unknown, or the size differs from the header.
    """
    size = frame.rows, frame.columns, frame.samples
    if data[:3] == b"\xff\xd8\xff" and codecs.jpeg_size(data) == size:
        return _SOF.get(codecs.jpeg_process(data) or 0, JPEGLossless)
    if (data[:4] == b"\xff\x4f\xff\x51" or data[4:8] == b"jP  ") and codecs.jpeg_2000_size(data) == size:
        return JPEG2000Lossless
    if frame.nbytes <= len(data) <= frame.nbytes + 1:
        return ExplicitVRLittleEndian
    if data[:8] == struct.pack("<2I", frame.samples * frame.bits_allocated // 8, 64):
        return RLELossless
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
    lossy = syntax in (JPEGBaseline8Bit, JPEGExtended12Bit)
    if lossy and (codecs.jpeg_bits(first) < int(ds.BitsStored) or str(ds.get("LossyImageCompression", "")) == "00"):
        raise DataError(f"{instance}: its store sends frames with additional lossy compression; download the file")
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    with library_errors(f"{instance}: its store's metadata cannot be read", "download the file"):
        return ds, StoreFrames.of(ds, cast(Path, instance), frame, syntax)
