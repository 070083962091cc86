"""A writer of small DICOM files in every transfer syntax, for the tests of the reader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.uid import UID

NATIVE = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"]
JPEG = "1.2.840.10008.1.2.4."
RLE = "1.2.840.10008.1.2.5"
SYNTAXES = [*NATIVE, RLE, *(JPEG + end for end in ("57", "70", "80", "81", "90", "91", "201"))]


def encode(pixels: np.ndarray, syntax: str, bits: int) -> bytes:
    """One frame, losslessly; pixels are unsigned bit patterns."""
    if syntax == JPEG + "57":
        return imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=6, bitspersample=bits)
    if syntax == JPEG + "70":
        return imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=bits)
    if syntax in (JPEG + "80", JPEG + "81"):
        return imagecodecs.jpegls_encode(pixels, level=0)
    if syntax in (JPEG + "90", JPEG + "91"):
        return imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="J2K", bitspersample=bits, reversible=True)
    if syntax == JPEG + "201":
        return imagecodecs.htj2k_encode(pixels)
    assert syntax == RLE
    rows, columns = pixels.shape
    depth = 8 * pixels.itemsize
    kind = {"rows": rows, "columns": columns, "samples_per_pixel": 1, "number_of_frames": 1, "bits_allocated": depth}
    more = {"bits_stored": depth, "pixel_representation": 0, "photometric_interpretation": "MONOCHROME2"}
    return RLELosslessEncoder.encode(pixels, transfer_syntax_uid=RLE, **kind, **more)


@pytest.fixture
def write_dicom(tmp_path: Path) -> Callable[..., Path]:
    """write(pixels, syntax=..., bits=..., **elements) -> path; pixels (H, W) or (frames, H, W), stored bit patterns."""

    def write(
        pixels: np.ndarray, syntax: str = NATIVE[1], bits: int = 12, name: str = "x.dcm", **elements: Any
    ) -> Path:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = UID(syntax)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1.2")
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
        ds.Modality, ds.PatientID, ds.PatientOrientation = "MG", "P1", ["A", "R"]
        frames = pixels if pixels.ndim == 3 else pixels[None]
        ds.Rows, ds.Columns = frames.shape[1:]
        if pixels.ndim == 3:
            ds.NumberOfFrames = len(frames)
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * pixels.itemsize, bits, bits - 1
        for key, value in elements.items():
            setattr(ds, key, value)
        if syntax in NATIVE:
            big = UID(syntax) == NATIVE[2]
            data = frames.astype(frames.dtype.newbyteorder(">" if big else "<")).tobytes()
            ds.add_new("PixelData", "OB" if pixels.itemsize == 1 else "OW", data + b"\0" * (len(data) % 2))
        else:
            ds.add_new("PixelData", "OB", encapsulate([encode(frame, syntax, bits) for frame in frames]))
            ds["PixelData"].is_undefined_length = True
        path = tmp_path / name
        ds.save_as(path, enforce_file_format=True)
        return path

    return write
