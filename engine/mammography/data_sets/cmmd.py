"""CMMD, the Chinese Mammography Database (TCIA): a row per breast; side and view are in the DICOM headers only."""

from __future__ import annotations

from ...datasets.tables import values
from ...errors import DataError
from ...images.header import DicomInfo, read_headers
from .files import DataSet, Files, Records, unlabelled_record

_KINDS = ("normal", "benign", "malignant")
_TABLES = ("CMMD_clinicaldata_revision.xlsx", "CMMD_clinicaldata_revision.csv")


def read(files: Files) -> Records:
    """One record per DICOM file; images of a breast that is not in the table have no label."""
    table = files.rows(*_TABLES)
    table.require("ID1", "LeftRight", "classification")
    breasts: dict[tuple[str, str | None], dict[str, str]] = {}
    for place, row in zip(table.places, table.rows, strict=True):
        side = values.side(row["LeftRight"])
        kind = row["classification"].lower()
        if side is None or kind not in _KINDS:
            text = f"LeftRight {row['LeftRight']!r}, classification {row['classification']!r}"
            raise DataError(f"{table.path}, {place}: unknown {text}; download the table again")
        known = breasts.setdefault((row["ID1"], side), row)
        if _KINDS.index(kind) > _KINDS.index(known["classification"].lower()):  # a row for each finding
            breasts[row["ID1"], side] = row
    paths = files.matching([".dcm"]) if files.path.is_dir() else []
    if not paths:
        raise DataError(f"{files.path}: contains no .dcm files, which have side and view; download them")
    for path, info in zip(paths, read_headers(paths), strict=True):
        # An unreadable file is reported when it is opened.
        header = info if isinstance(info, DicomInfo) else None
        patient = (header.patient_id if header else None) or path.parent.name
        side = header.laterality if header else None
        row = breasts.get((patient, side), {})
        extra = {name: row[name] for name in ("abnormality", "subtype", "Age") if row.get(name)}
        yield unlabelled_record(
            path=path,
            patient_id=patient,
            laterality=side,
            view=header.view if header else None,
            exam_id=patient,
            labels={"malignant": float(row["classification"].lower() == "malignant")} if row else {},
            extra=extra,
        )


DATA_SET = DataSet(
    name="cmmd",
    title="CMMD",
    tables=_TABLES,
    rules={"malignant": "1 if the breast is Malignant by biopsy, 0 if Benign (or Normal); others have no label"},
    split="none",
    read=read,
)
