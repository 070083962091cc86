"""Image data in DICOM headers, without the pixels; the headers of many files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from ..errors import DataError
from . import mammography
from .dicom_file import DicomFile, read_header, without_validation
from .parallel import run_parallel
from .rawfile import library_errors

UNDECLARED = "not declared"  # the photometric interpretation of a header without one
# Mammography, breast projections, digital X-ray.
_FOR_PROCESSING = {"1.2.840.10008.5.1.4.1.1.1.2.1", "1.2.840.10008.5.1.4.1.1.13.1.5", "1.2.840.10008.5.1.4.1.1.1.1.1"}


@dataclass(frozen=True)
class DicomInfo:
    """Image data in a DICOM header; None for missing data.

    The printed form omits data that identify the patient, so that logs do not contain them by accident.
    """

    rows: int
    columns: int
    frames: int
    bits_stored: int
    transfer_syntax: str
    modality: str | None
    patient_id: str | None = field(repr=False)
    study_uid: str | None = field(repr=False)
    laterality: str | None
    """L or R."""
    view: str | None
    """CC, MLO, ML, ... as in ViewPosition."""
    orientation: tuple[str, str] | None
    """The directions of rows and columns, as in PatientOrientation: ("A", "F") is anterior to the right, feet below."""
    spacing: tuple[float, float] | None
    """Millimetres between rows and between columns, at the detector unless the file is calibrated."""
    photometric: str
    for_processing: bool
    """Raw detector values, not meant for display."""
    flags: tuple[str, ...]
    """Differences from a standard view, sorted: "implant", "spot", "magnification", "phantom", "stereo",
    "synthetic", "tomosynthesis", "projection", "contrast", "partial", "burned in", "lossy", "overlay", and view
    modifiers ("rolled", "tangential", "cleavage", "implant displaced", ...)."""
    magnification: float | None
    """The magnification at the detector: `spacing` divided by it is millimetres in the breast. None if it is unknown,
    or if `spacing` is calibrated."""
    manufacturer: str | None
    matrix: tuple[int, int] | None
    """Rows and columns of the whole slide, if the frames are its tiles."""

    @property
    def is_mammogram(self) -> bool:
        """Whether the image is a mammogram: modality MG, or a mammographic view."""
        return self.modality == "MG" or self.view in mammography.VIEWS


def read_info(path: str | Path) -> DicomInfo:
    """The header of a DICOM file, without its pixels; `DataError` if it is missing, damaged or not an image."""
    path = Path(path)
    with DicomFile(path) as file, without_validation():
        return describe(read_header(file, path)[0], path)


def describe(ds: Dataset, path: Path) -> DicomInfo:
    """The data of a parsed header; `DataError` for invalid elements."""
    # pydicom converts elements on access.
    with library_errors(f"{path}: malformed DICOM header", "correct it or fetch it again"):
        laterality, view = mammography.side_and_view(ds)
        sop_class = str(ds.get("SOPClassUID", ""))
        matrix = ds.get("TotalPixelMatrixRows"), ds.get("TotalPixelMatrixColumns")
        info = DicomInfo(
            rows=int(ds.Rows),
            columns=int(ds.Columns),
            frames=int(ds.get("NumberOfFrames") or 1),
            bits_stored=int(ds.BitsStored),
            transfer_syntax=str(ds.file_meta.TransferSyntaxUID),
            modality=_text(ds.get("Modality")),
            patient_id=_text(ds.get("PatientID")),
            study_uid=_text(ds.get("StudyInstanceUID")),
            laterality=laterality,
            view=view,
            orientation=mammography.orientation(ds),
            spacing=mammography.spacing(ds),
            photometric=_text(ds.get("PhotometricInterpretation")) or UNDECLARED,
            for_processing=sop_class in _FOR_PROCESSING
            or mammography.text(ds.get("PresentationIntentType")) == "FOR PROCESSING",
            flags=mammography.flags(ds),
            magnification=mammography.magnification(ds) if mammography.at_detector(ds) else None,
            manufacturer=_text(ds.get("Manufacturer")),
            matrix=(int(matrix[0]), int(matrix[1])) if all(matrix) else None,  # pyright: ignore[reportArgumentType]
        )
    if info.rows < 1 or info.columns < 1 or info.frames < 1:
        raise DataError(f"{path}: damaged header ({info.frames} frames of {info.rows} x {info.columns} pixels)")
    return info


def _text(value: Any) -> str | None:
    """The value as text in one line; None if it is empty."""
    return " ".join(str(value).split()) or None if value is not None else None


def read_headers(paths: Sequence[Path]) -> list[DicomInfo | DataError]:
    """`read_info` of each file, in the order of `paths`; the error for a file that cannot be read."""
    found = dict(run_parallel(read_info, paths, chunk=64))
    return [found[number] for number in range(len(paths))]
