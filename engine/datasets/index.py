"""A folder of images as a table: what the headers say of each, without who the patient is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DataError
from ..images.header import DicomInfo, read_info
from ..images.open import open_pixels
from ..images.parallel import run_parallel
from .names import NamePattern, find_pattern
from .tables.folders import image_files
from .tables.mask_names import masks_among
from .tables.schema import Record

DICOM_MARK = b"DICM"


@dataclass(frozen=True)
class Index:
    """What a folder holds."""

    records: list[Record]
    """One per image, label -1; `extra` has rows, columns, frames, and for DICOM what else matters for training."""
    errors: list[DataError]
    """Files that are no images or damaged, or whose names do not fit the pattern that was asked for, each named."""
    pattern: str | None
    """Of the file names from which patients, sides and views are; None if none are."""
    masks: list[Path]
    """Files that are left out, because they are masks by their names."""


def index_folder(
    folder: str | Path,
    *,
    identifiers: bool = False,
    pattern: str | None = None,
    workers: int | None = None,
    on_start: Callable[[int], object] | None = None,
    on_done: Callable[[], object] | None = None,
) -> Index:
    """Read the headers of all images below a folder, in parallel; a bad file is noted, and stops nothing.

    Patients and exams of DICOM files are numbered in the order of their first file (P00001, E00001), so that splits by
    patient are possible and nobody is named; identifiers=True keeps PatientID and StudyInstanceUID.

    Files whose header names no patient (PNG, TIFF) have patient, side and view from their names, if one of the common
    patterns of `names.COMMON` fits all of them; else each stands for a patient of its own, and its `patient_known` is
    False. pattern: a pattern for the names of all files, which then counts before their headers; see `names`.
    on_start: called with the number of files. on_done: called after each.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    wanted = None if pattern is None else NamePattern(pattern)
    paths = image_files(folder)
    masks = masks_among(paths, folder)
    left_out = set(masks)
    paths = [path for path in paths if path not in left_out]
    if on_start is not None:
        on_start(len(paths))
    found: list[Record | DataError] = [DataError(f"{path}: was not read") for path in paths]
    for number, record in run_parallel(_read, paths, workers=workers, chunk=64):
        found[number] = record
        if on_done is not None:
            on_done()
    records = [record for record in found if isinstance(record, Record)]
    if not identifiers:
        records = _numbered(records)
    errors = [error for error in found if isinstance(error, DataError)]
    nameless = [record.path for record in records if not record.patient_known]
    fitting = wanted or find_pattern(nameless)
    if fitting is not None:
        named = [_named(record, fitting, always=wanted is not None) for record in records]
        errors += [
            DataError(f"{record.path}: its name does not fit the pattern {fitting.text}; rename it, or name another")
            for record, new in zip(records, named, strict=True)
            if new is None
        ]
        records = [record for record in named if record is not None]
    return Index(records, errors, fitting.text if fitting else None, masks)


def _numbered(records: Sequence[Record]) -> list[Record]:
    """Records whose patients and exams of DICOM headers are numbers."""
    known = [record for record in records if record.patient_known]
    patients = {name: f"P{number:05d}" for number, name in enumerate(dict.fromkeys(r.patient_id for r in known), 1)}
    named = dict.fromkeys(r.exam_id for r in records if r.exam_id)  # a study may be named where its patient is not
    exams = {name: f"E{number:05d}" for number, name in enumerate(named, 1)}
    return [
        replace(
            record,
            patient_id=patients.get(record.patient_id, record.patient_id),
            exam_id=record.exam_id and exams[record.exam_id],
        )
        for record in records
    ]


def _named(record: Record, pattern: NamePattern, *, always: bool) -> Record | None:
    """With what the file's name says, where the header says nothing or `always`; None if the name does not fit."""
    if record.patient_known and not always:
        return record
    said = pattern.match(record.path)
    if said is None or said.patient is None:
        return None
    return replace(
        record,
        patient_id=said.patient,
        patient_known=True,
        exam_id=said.exam or said.patient,
        laterality=said.laterality or record.laterality,
        view=said.view or record.view,
    )


def _read(path: Path) -> Record:
    if is_dicom(path):
        return _dicom_record(path, read_info(path))
    channels, height, width = open_pixels(path).shape
    extra = {"rows": str(height), "columns": str(width), "channels": str(channels)}
    return Record(path, -1, str(path), patient_known=False, extra=extra)


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's mark; `DataError` if it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            return False
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
        patient_known=info.patient_id is not None,
        laterality=info.laterality,
        view=info.view,
        extra=extra,
        exam_id=info.study_uid or info.patient_id,
        manufacturer=info.manufacturer,
    )
