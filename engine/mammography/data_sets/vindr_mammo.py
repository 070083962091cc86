"""VinDr-Mammo (PhysioNet): exams of four views with BI-RADS and boxes, no pathology."""

from __future__ import annotations

from ...datasets.tables import values
from ...datasets.tables.generic import SPLIT_NAMES
from ...datasets.tables.schema import Box, Finding
from ...errors import DataError
from ...parsing import parse_literal
from .files import DataSet, Files, Records, unlabelled_record


def read(files: Files) -> Records:
    """One record per row of breast-level_annotations.csv; boxes from finding_annotations.csv.

    The data set has no patients; each exam is of a different one, so the study is used as the patient.
    """
    table = files.rows("breast-level_annotations.csv")
    table.require("study_id", "image_id", "laterality", "view_position", "breast_birads", "split")
    findings = _findings(files)
    makers = _manufacturers(files)
    for place, row in zip(table.places, table.rows, strict=True):
        grade = values.birads(row["breast_birads"])
        suspicious = values.suspicious(grade)
        split = row["split"].lower()
        if split not in SPLIT_NAMES:
            raise DataError(f"{table.path}, {place}: split {row['split']!r} must be training or test")
        yield unlabelled_record(
            path=files.expect(f"images/{row['study_id']}/{row['image_id']}.dicom"),
            patient_id=row["study_id"],
            split=SPLIT_NAMES[split],
            laterality=values.side(row["laterality"]),
            view=row["view_position"].upper(),
            exam_id=row["study_id"],
            density=values.density(row.get("breast_density", "")),
            birads=grade,
            manufacturer=makers.get(row["image_id"]),
            labels={} if suspicious is None else {"suspicious": suspicious},
            findings=tuple(findings.get(row["image_id"], ())),
        )


def _findings(files: Files) -> dict[str, list[Finding]]:
    if files.table("finding_annotations.csv") is None:
        return {}
    table = files.rows("finding_annotations.csv")
    table.require("image_id", "finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax")
    found: dict[str, list[Finding]] = {}
    for place, row in zip(table.places, table.rows, strict=True):
        try:
            kinds = [str(kind) for kind in parse_literal(row["finding_categories"])]
        except ValueError as error:
            text = f"finding_categories {row['finding_categories']!r} must be a list"
            raise DataError(f"{table.path}, {place}: {text}; download it again") from error
        sides = [values.number(row[name]) for name in ("ymin", "ymax", "xmin", "xmax")]
        if kinds == ["No Finding"] or None in sides:
            continue
        top, bottom, left, right = (round(side) for side in sides if side is not None)
        box: Box = (max(top, 0), bottom, max(left, 0), right)
        grade = values.birads(row["finding_birads"]) or ""
        found.setdefault(row["image_id"], []).append(
            Finding(
                kind=", ".join(kinds).lower(), box=box if box[0] < bottom and box[2] < right else None, birads=grade
            )
        )
    return found


def _manufacturers(files: Files) -> dict[str, str]:
    """The manufacturer by image, from metadata.csv; empty if it was not downloaded."""
    if files.table("metadata.csv") is None:
        return {}
    table = files.rows("metadata.csv")
    image = next((name for name in ("SOP Instance UID", "image_id") if name in table.header), None)
    maker = next((name for name in ("Manufacturer", "Manufacturer's Model Name") if name in table.header), None)
    return {row[image]: row[maker] for row in table.rows if row[maker]} if image and maker else {}


DATA_SET = DataSet(
    name="vindr-mammo",
    title="VinDr-Mammo",
    tables=("breast-level_annotations.csv",),
    rules={"suspicious": "1 for a breast of BI-RADS 4 to 6, 0 of 1 to 3 (there is no pathology)"},
    split="training and test as published",
    read=read,
)
