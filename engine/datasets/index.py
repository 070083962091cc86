"""A folder of images as a table: what the headers say of each, without who the patient is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DataError
from ..images.header import DicomInfo, read_info
from ..images.open import open_pixels
from ..images.parallel import run_parallel
from .tables.generic import image_files
from .tables.schema import Record

DICOM_MARK = b"DICM"


@dataclass(frozen=True)
class Index:
    """What a folder holds."""

    records: list[Record]
    """One per image, label -1; `extra` has rows, columns, frames, and for DICOM what else matters for training."""
    errors: list[DataError]
    """Files that are no images or damaged, each named."""


def index_folder(
    folder: str | Path,
    *,
    identifiers: bool = False,
    workers: int | None = None,
    on_start: Callable[[int], object] | None = None,
    on_done: Callable[[], object] | None = None,
) -> Index:
    """Read the headers of all images below a folder, in parallel; a bad file is noted, and stops nothing.

    Patients and exams are numbered in the order of their first file (P00001, E00001), so that splits by patient are
    possible and nobody is named; identifiers=True keeps PatientID and StudyInstanceUID. Images that name no patient
    (PNG, TIFF) are each a patient of their own.
    on_start: called with the number of files. on_done: called after each.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = image_files(folder)
    if on_start is not None:
        on_start(len(paths))
    found: list[Record | DataError] = [DataError(f"{path}: was not read") for path in paths]
    for number, record in run_parallel(_read, paths, workers=workers, chunk=64):
        found[number] = record
        if on_done is not None:
            on_done()
    records = [record for record in found if isinstance(record, Record)]
    if not identifiers:
        patients = _numbers([record.patient_id for record in records], "P")
        exams = _numbers([record.exam_id or "" for record in records], "E")
        records = [
            replace(record, patient_id=patient, exam_id=exam)
            for record, patient, exam in zip(records, patients, exams, strict=True)
        ]
    return Index(records, [error for error in found if isinstance(error, DataError)])


def _numbers(names: Sequence[str], letter: str) -> list[str]:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names), 1)}
    return [f"{letter}{numbers[name]:05d}" for name in names]


def _read(path: Path) -> Record:
    if is_dicom(path):
        return _dicom_record(path, read_info(path))
    channels, height, width = open_pixels(path).shape
    extra = {"rows": str(height), "columns": str(width), "channels": str(channels)}
    return Record(path, -1, str(path), exam_id=str(path), extra=extra)


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's mark; `DataError` if it cannot be read."""
    if path.is_dir():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == DICOM_MARK
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _dicom_record(path: Path, info: DicomInfo) -> Record:
    # A list of what may be told, not of what may not: a new element of the header must not slip out.
    extra = {
        "rows": str(info.rows),
        "columns": str(info.columns),
        "frames": str(info.frames),
        "bits": str(info.bits_stored),
        "modality": info.modality or "",
        "photometric": info.photometric,
        "transfer_syntax": info.transfer_syntax,
        "spacing": "" if info.spacing is None else f"{info.spacing[0]:g} {info.spacing[1]:g}",
        "orientation": " ".join(info.orientation or ()),
        "for_processing": str(int(info.for_processing)),
        "flags": ", ".join(info.flags),
    }
    return Record(
        path,
        -1,
        info.patient_id or str(path),
        laterality=info.laterality,
        view=info.view,
        extra=extra,
        exam_id=info.study_uid or info.patient_id or str(path),
        manufacturer=info.manufacturer,
    )
