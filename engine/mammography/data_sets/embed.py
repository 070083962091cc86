"""EMBED (Emory): screening and diagnostic mammograms; a table of images, and one of findings with pathology.

A row of the clinical table belongs to the images of its exam (acc_anon) and side; side B or empty means both breasts.
"""

from __future__ import annotations

from ...datasets.tables import values
from ...datasets.tables.generic import identifier
from ...datasets.tables.schema import Box, Finding
from ...errors import DataError
from ...parsing import parse_literal
from .files import DataSet, Files, Records, unlabelled_record

_METADATA = ("EMBED_OpenData_metadata.csv", "EMBED_OpenData_metadata_reduced.csv")
_CLINICAL = ("EMBED_OpenData_clinical.csv", "EMBED_OpenData_clinical_reduced.csv")
# asses -> BI-RADS, most severe first.
_ASSESSMENTS = {"K": "6", "M": "5", "S": "4", "A": "0", "P": "3", "B": "2", "N": "1"}
_KEPT = ("study_date_anon", "StudyDescription", "FinalImageType", "spot_mag", "match_level")
_SCREENSHOTS = ("ROI_SSC", "ROI_SS")


def read(files: Files) -> Records:
    """One record per image, without the screenshots with radiologists' drawings (ROI_SSC, ROI_SS)."""
    table = files.rows(*_METADATA)
    table.require("empi_anon", "acc_anon", "anon_dicom_path", "ImageLateralityFinal", "ViewPosition")
    clinical = _clinical(files)
    for place, row in zip(table.places, table.rows, strict=True):
        if row.get("FinalImageType") in _SCREENSHOTS:
            continue
        side = values.side(row["ImageLateralityFinal"])
        exam = identifier(row["acc_anon"])
        found = [item for item in clinical.get(exam, []) if side is None or item["side"] in (side, "")]
        cancer = _cancer(found)
        grades = {_ASSESSMENTS[item["asses"]] for item in found if item["asses"] in _ASSESSMENTS}
        yield unlabelled_record(
            path=files.expect(row["anon_dicom_path"]),
            patient_id=identifier(row["empi_anon"]),
            laterality=side,
            view=row["ViewPosition"].upper() or None,
            exam_id=exam,
            density=next((d for item in found if (d := values.density(item["density"]))), None),
            birads=next((grade for grade in _ASSESSMENTS.values() if grade in grades), None),
            manufacturer=row.get("Manufacturer") or None,
            labels={} if cancer is None else {"cancer": cancer},
            findings=_boxes(row.get("ROI_coords", ""), f"{table.path}, {place}"),
            extra={name: row[name] for name in _KEPT if row.get(name)},
        )


def _clinical(files: Files) -> dict[str, list[dict[str, str]]]:
    """Rows of the clinical table by exam; side is L, R or empty for both."""
    table = files.rows(*_CLINICAL)
    table.require("acc_anon", "asses", "side")
    found: dict[str, list[dict[str, str]]] = {}
    for row in table.rows:
        severity = values.number(row.get("path_severity", ""))
        item = {
            "side": values.side(row["side"]) or "",
            "asses": row["asses"].upper(),
            "density": row.get("tissueden", "").removesuffix(".0"),
            "severity": "" if severity is None else str(int(severity)),
        }
        found.setdefault(identifier(row["acc_anon"]), []).append(item)
    return found


def _cancer(found: list[dict[str, str]]) -> float | None:
    severities = {item["severity"] for item in found if item["severity"]}
    if severities & {"0", "1"}:
        return 1.0
    if severities & {"2", "3", "4", "5"}:
        return 0.0
    # Without pathology, only exams assessed as negative or benign are known to be free of cancer.
    return 0.0 if found and not severities and {item["asses"] for item in found} <= {"N", "B"} else None


def _boxes(text: str, place: str) -> tuple[Finding, ...]:
    """The boxes of ROI_coords: [[ymin, xmin, ymax, xmax], ...], as a Python list or tuple."""
    if not text or text in ("[]", "()"):
        return ()
    try:
        value = parse_literal(text)
        rows = value if isinstance(value[0], list | tuple) else [value]
        boxes: list[Box] = [(int(top), int(bottom), int(left), int(right)) for top, left, bottom, right in rows]
    except (ValueError, OverflowError, TypeError, IndexError) as error:
        raise DataError(f"{place}: ROI_coords {text!r} must be boxes; download the table again") from error
    boxes = [(max(top, 0), bottom, max(left, 0), right) for top, bottom, left, right in boxes]
    return tuple(Finding(box=box) for box in boxes if box[0] < box[1] and box[2] < box[3])


DATA_SET = DataSet(
    name="embed",
    title="EMBED",
    tables=_METADATA,
    rules={
        "cancer": "1 if pathology of the exam and side found cancer (path_severity 0, 1), 0 if it found none (2 to 5) "
        "or there is none and all assessments are N or B; other images have no label"
    },
    split="none",
    read=read,
)
