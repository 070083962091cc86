"""A table of a folder of images: the header data of each image, without the patient's identity.

Patient, exam, side and view of files whose header does not state them come from their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DataError
from ..images.header import DicomInfo, read_info
from ..images.open import begins_as_dicom, open_pixels
from ..images.parallel import run_parallel
from ..images.rawfile import reading
from .tables import values
from .tables.folders import image_files, masks_among
from .tables.schema import Record


@dataclass(frozen=True)
class Index:
    """The images of a folder."""

    records: list[Record]
    """One per image, label -1; `extra` has rows, columns, frames, and for DICOM other data that matter for training."""
    errors: list[DataError]
    """An error for each file that is not an image, is damaged, or does not fit the given pattern."""
    pattern: str | None
    """The pattern of the file names that gave patients, sides and views; None if names were not used."""
    masks: list[Path]
    """Files that were left out because their names are names of masks."""


def index_folder(
    folder: str | Path,
    *,
    identifiers: bool = False,
    pattern: str | None = None,
    workers: int | None = None,
    on_start: Callable[[int], object] = lambda count: None,
    on_done: Callable[[], object] = lambda: None,
) -> Index:
    """Read the headers of all images below a folder, in parallel; a damaged file is recorded and stops nothing.

    Patients and exams of DICOM files are numbered in the order of their first file (P00001, E00001): this allows splits
    by patient without identifying anybody.

    Patient, side and view of files without a patient in the header (PNG, TIFF) come from the file names, if one of the
    patterns `COMMON` fits all of them. Otherwise each file is a patient, with `patient_known` False.

    Args:
        identifiers: keeps PatientID and StudyInstanceUID.
        pattern: a pattern for the names of all files, which takes precedence over their headers; see `NamePattern`.
        on_start: called with the number of files.
        on_done: called after each file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    wanted = None if pattern is None else NamePattern(pattern)
    paths = image_files(folder)
    masks = masks_among(paths, folder)
    left_out = set(masks)
    paths = [path for path in paths if path not in left_out]
    on_start(len(paths))
    found: list[Record | DataError] = [DataError(f"{path}: not read") for path in paths]
    for number, record in run_parallel(_read, paths, workers=workers, chunk=64):
        found[number] = record
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
            DataError(f"{record.path}: {fitting.misfit(record.path)}; rename it, or change the pattern")
            for record, new in zip(records, named, strict=True)
            if new is None
        ]
        records = [record for record in named if record is not None]
    return Index(records, errors, fitting.text if fitting else None, masks)


def _numbered(records: Sequence[Record]) -> list[Record]:
    """The records with numbers instead of the patients and exams of DICOM headers."""
    known = [record for record in records if record.patient_known]
    patients = {name: f"P{number:05d}" for number, name in enumerate(dict.fromkeys(r.patient_id for r in known), 1)}
    named = dict.fromkeys(r.exam_id for r in records if r.exam_id)  # a study may be known without its patient
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
    """The record with the fields of the file name, unless the header has some; None if the name does not fit."""
    if record.patient_known and not always:
        return record
    found = pattern.match(record.path)
    if found is None or (patient := found["patient"]) is None:
        return None
    return replace(
        record,
        patient_id=patient,
        patient_known=True,
        exam_id=found.get("exam") or patient,
        laterality=found.get("laterality") or record.laterality,
        view=found.get("view") or record.view,
    )


def _read(path: Path) -> Record:
    if is_dicom(path):
        return _dicom_record(path, read_info(path))
    channels, height, width = open_pixels(path).shape
    extra = {"rows": str(height), "columns": str(width), "channels": str(channels)}
    return Record(path, -1, str(path), patient_known=False, extra=extra)


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM; `DataError` if it cannot be read."""
    with reading(path):
        if path.exists() and not path.is_file():
            return False
        with path.open("rb") as file:
            return begins_as_dicom(file.read(132))


def _dicom_record(path: Path, info: DicomInfo) -> Record:
    # An allow-list: new header elements must not be exported by accident.
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


_VIEWS = "CC|MLO|ML|LMO|LM|XCCL|XCCM|XCC|FB|AT|SIO|ISO"
_FIELDS = {
    "patient": r"[^/]+?",
    "exam": r"[^/]+?",
    "laterality": "|".join(values.SIDES),
    "view": _VIEWS,
    "any": r"[^/]*?",
}
_FIELD = re.compile(r"\{(\w*)\}")
COMMON = tuple(
    "{patient}_{laterality}-{view} {patient}_{laterality}_{view} {patient}_{laterality}{view} "
    "{patient}-{laterality}-{view} {patient}.{laterality}_{view} {patient}_{view}_{laterality} "
    "{any}_{patient}_MG_{laterality}_{view}_ANON "
    "{patient}/{laterality}-{view} {patient}/{laterality}_{view} {patient}/{laterality}{view} "
    "{patient}/{view}_{laterality} "
    "{patient}_{laterality}-{view}_{any} {patient}_{laterality}_{view}_{any} {patient}.{laterality}_{view}{any}".split()
)
"""Patterns that are tried if none is given; the first that fits every name is used."""


class NamePattern:
    """A pattern of file names, as ``{patient}_{laterality}-{view}``, without the ending of the file.

    Fields are {patient}, {exam}, {laterality}, {view} and {any}, which is ignored; other text is literal and matches in
    upper and lower case. A pattern with slashes also matches the last folders.

    Raises:
        DataError: if a field is unknown or repeated, or {patient} is missing.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        fields = _FIELD.findall(text)
        wrong = [field for field in fields if field not in _FIELDS]
        if wrong or "patient" not in fields or any(fields.count(field) > 1 for field in _FIELDS if field != "any"):
            raise DataError(
                f"pattern {text!r}: use each of {{patient}}, {{exam}}, {{laterality}} and {{view}} at most once, "
                "and {any} for text to ignore; {patient} is required"
            )
        pieces = _FIELD.split(text)
        expression = re.escape(pieces[0])
        self._begins: list[tuple[str, re.Pattern[str]]] = []  # each field with the text before it
        before = pieces[0]
        for field, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            expression += f"(?:{_FIELDS[field]})" if field == "any" else f"(?P<{field}>{_FIELDS[field]})"
            self._begins.append((f"{before}{{{field}}}", re.compile(expression, re.IGNORECASE)))
            expression, before = expression + re.escape(literal), literal
        self._expression = re.compile(expression, re.IGNORECASE)
        self._depth = text.count("/") + 1

    def match(self, path: Path) -> dict[str, str | None] | None:
        """The fields in a path, without those that the pattern lacks; None if it does not fit the pattern."""
        found = self._expression.fullmatch(self._name(path))
        if found is None:
            return None
        fields: dict[str, str | None] = found.groupdict()
        if side := fields.get("laterality"):
            fields["laterality"] = values.side(side)
        if view := fields.get("view"):
            fields["view"] = view.upper()
        return fields

    def misfit(self, path: Path) -> str:
        """Why a path does not fit the pattern: its first field that is missing, with the texts that it can have."""
        name = self._name(path)
        field = next((field for field, begin in self._begins if begin.match(name) is None), None)
        if field is None:
            return f"{name} does not fit the pattern {self.text}: it has other text after {self._begins[-1][0]}"
        texts = {"laterality": " (L, R, left, ...)", "view": " (CC, MLO, ML, ...)"}
        said = next((text for key, text in texts.items() if field.endswith(f"{{{key}}}")), "")
        return f"{name} does not fit the pattern {self.text}: it has no {field}{said}"

    def _name(self, path: Path) -> str:
        return "/".join([*path.parts[:-1], path.stem][-self._depth :])


def find_pattern(paths: Sequence[Path]) -> NamePattern | None:
    """The first common pattern that fits all paths; None if no pattern does, or there are no paths."""
    patterns = (NamePattern(text) for text in COMMON)
    return next((p for p in patterns if paths and all(p.match(path) for path in paths)), None)
