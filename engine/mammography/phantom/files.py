"""Phantoms as files, written tile by tile, so that no image is ever in memory as a whole."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    BreastTomosynthesisImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)

from ...datasets.tables.schema import Box
from ...errors import DataError
from ...images import writers
from .image import Lesion, PhantomImage

SPACING, BETWEEN = 0.1, 1.0  # millimetres between pixels, and between slices
_VIEWS = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}
_STRIP = 256, 2048  # rows and columns of a block that is computed at once for DICOM
_MOST = 2**32 - 2  # the maximum bytes of an element of explicit length


def stored_box(box: Box, width: int, laterality: str) -> Box:
    """A box of the image with its chest wall left, in file coordinates: right breasts are stored mirrored."""
    return box if laterality == "L" else (box[0], box[1], width - box[3], width - box[2])


def write_dicom(
    path: Path,
    image: PhantomImage,
    *,
    patient: str,
    study: str,
    laterality: str,
    view: str,
    slices: int = 0,
    threads: int = 1,
    report: Callable[[int], object] | None = None,
) -> None:
    """Write a For Presentation mammogram, 12 bit, uncompressed, as a scanner stores it: right breasts have their chest
    wall on the right.

    Args:
        path: the file.
        image: the phantom.
        patient, study, laterality, view: values of the header.
        slices: of a tomosynthesis volume, one frame each; 0 for a mammogram.
        threads: the number of threads that compute blocks.
        report: called with the number of pixels written since the last call.

    Raises:
        DataError: if the image is too large for DICOM.
    """
    height, width = image.shape
    size = 2 * height * width * max(1, slices)
    if max(height, width) > 65535 or size > _MOST:
        if slices:
            raise DataError(f"{path}: {slices} x {height} x {width} pixels exceed a DICOM file; use fewer slices")
        raise DataError(f"{path}: {height} x {width} pixels exceed a DICOM frame; write phantoms as tiff")
    ds = header(image.shape, patient, study, laterality, view)
    if slices:
        _as_volume(ds, slices)
    ds.save_as(path, enforce_file_format=True)
    tiles = [
        stored_box((top, min(top + _STRIP[0], height), left, min(left + _STRIP[1], width)), width, laterality)
        for top in range(0, height, _STRIP[0])
        for left in range(0, width, _STRIP[1])
    ]
    across = len(range(0, width, _STRIP[1]))
    frames = [image.at_slice(number, slices) for number in range(slices)] or [image]
    work = [(frame, tile) for frame in frames for tile in tiles]
    parts = writers.map_ahead(lambda one: _oriented(one[0].read(*one[1]), laterality), work, threads)
    with path.open("ab") as file:
        file.write(struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, size))
        for _ in range(len(work) // across):
            strip = np.concatenate([next(parts) for _ in range(across)], axis=1)
            file.write(np.ascontiguousarray(strip, "<u2").data)
            if report is not None:
                report(strip.size)


def _as_volume(ds: Dataset, slices: int) -> None:
    """Make the header of a mammogram that of a tomosynthesis volume (PS3.3 A.55)."""
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = BreastTomosynthesisImageStorage
    ds.ImageType = ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]
    ds.NumberOfFrames = slices
    measures, plane = Dataset(), Dataset()
    measures.PixelSpacing, measures.SpacingBetweenSlices, measures.SliceThickness = [SPACING] * 2, BETWEEN, BETWEEN
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], []
    for number in range(slices):
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, number * BETWEEN]
        frame.PlanePositionSequence = [position]
        ds.PerFrameFunctionalGroupsSequence.append(frame)


def write_tiff(
    path: Path, image: PhantomImage, *, laterality: str, threads: int = 1, report: Callable[[int], object] | None = None
) -> None:
    """Write a tiled, losslessly compressed 16-bit (Big)TIFF, 12 bits scaled to 16; otherwise as `write_dicom`."""

    def read(*region: int) -> np.ndarray:
        values = image.read(*stored_box(region, image.shape[1], laterality))  # pyright: ignore[reportArgumentType]
        return _oriented(values << 4 | values >> 8, laterality)

    writers.write_tiff(path, image.shape, np.dtype(np.uint16), read, spacing=SPACING, threads=threads, report=report)


def write_mask(path: Path, image: PhantomImage, lesion: Lesion, *, laterality: str) -> None:
    """Write a mask as a tiled 8-bit TIFF of the size of the image: 255 inside the lesion."""

    def read(*region: int) -> np.ndarray:
        box = stored_box(region, image.shape[1], laterality)  # pyright: ignore[reportArgumentType]
        return _oriented(image.mask(lesion, *box), laterality)

    writers.write_tiff(path, image.shape, np.dtype(np.uint8), read, spacing=SPACING)


def _oriented(values: np.ndarray, laterality: str) -> np.ndarray:
    return values if laterality == "L" else values[:, ::-1]


def _coded(value: str, meaning: str) -> Dataset:
    """An item of a code sequence, with a SNOMED CT code."""
    ds = Dataset()
    ds.CodeValue, ds.CodingSchemeDesignator, ds.CodeMeaning = value, "SCT", meaning
    return ds


def header(shape: tuple[int, int], patient: str, study: str, laterality: str, view: str) -> Dataset:
    """The data set of a phantom mammogram without its pixels."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[study, patient, laterality, view])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[study, patient])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[study, patient, "series"])
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.Modality, ds.PresentationIntentType = "MG", "FOR PRESENTATION"
    ds.Manufacturer, ds.SeriesDescription = "gigamorph", "phantom"
    ds.PatientID = ds.PatientName = patient
    ds.PatientBirthDate, ds.PatientSex = "", "F"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20000101", "000000", "1", ""
    ds.ReferringPhysicianName, ds.SeriesNumber, ds.InstanceNumber = "", 1, 1
    ds.BodyPartExamined, ds.BurnedInAnnotation, ds.LossyImageCompression = "BREAST", "NO", "00"
    ds.ImageLaterality, ds.ViewPosition = laterality, view
    ds.PositionerType, ds.OrganExposed, ds.DetectorType = "MAMMOGRAPHIC", "BREAST", ""
    ds.AnatomicRegionSequence = [_coded("76752008", "Breast")]
    ds.ViewCodeSequence = [_coded(*_VIEWS[view])]
    ds.ViewCodeSequence[0].ViewModifierCodeSequence = []
    ds.AcquisitionContextSequence = []
    side = {"CC": {"L": "R", "R": "L"}, "MLO": {"L": "FR", "R": "FL"}}[view][laterality]
    ds.PatientOrientation = ["A" if laterality == "L" else "P", side]
    ds.ImagerPixelSpacing = [SPACING, SPACING]
    ds.Rows, ds.Columns = shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1
    ds.PixelPaddingValue = 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 2048, 4096, "LINEAR"  # the full range
    ds.PresentationLUTShape = "IDENTITY"
    return ds
