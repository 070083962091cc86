"""CSAW-CC: screening mammograms of Karolinska, cases and controls; one table with a row per image."""

from __future__ import annotations

from pathlib import PurePosixPath

from ...datasets.tables import values
from ...datasets.tables.schema import Finding
from .files import DataSet, Files, Records, unlabelled_record

_TABLE = "CSAW-CC_breast_cancer_screening_data.csv"
_KEPT = (
    *("exam_year", "x_age", "x_type", "x_lymphnode_met", "rad_timing", "rad_r1", "rad_r2", "rad_recall"),
    "libra_percentdensity",
)


def read(files: Files) -> Records:
    """One record per row, with a mask if FILE_mask.png exists."""
    table = files.rows(_TABLE)
    table.require("anon_patientid", "imagelaterality", "viewposition", "anon_filename", "x_case", "x_cancer_laterality")
    for row in table.rows:
        side = values.side(row["imagelaterality"])
        cancer = _cancer(row, side)
        name = PurePosixPath(row["anon_filename"].replace("\\", "/")).name
        mask = files.find(f"{PurePosixPath(name).stem}_mask.png")
        yield unlabelled_record(
            path=files.expect(name if name.lower().endswith(".dcm") else f"{name}.dcm"),
            patient_id=row["anon_patientid"],
            laterality=side,
            view=row["viewposition"].upper(),
            exam_id=f"{row['anon_patientid']}_{row.get('exam_year', '')}",
            manufacturer=row.get("dicom_manufacturer") or None,
            labels={} if cancer is None else {"cancer": cancer},
            findings=(Finding(kind="tumour", mask=mask, pathology="malignant"),) if mask else (),
            extra={name: row[name] for name in _KEPT if row.get(name)},
        )


def _cancer(row: dict[str, str], side: str | None) -> float | None:
    case, affected = values.number(row["x_case"]), values.side(row["x_cancer_laterality"])
    if case == 0:
        return 0.0
    return None if case is None or side is None or affected is None else float(side == affected)


DATA_SET = DataSet(
    name="csaw-cc",
    title="CSAW-CC",
    tables=(_TABLE,),
    rules={
        "cancer": "1 for images of the breast in which a case (x_case 1) has or will have the cancer "
        "(x_cancer_laterality; rad_timing says when), 0 for its other breast and for controls; no label if x_case "
        "or the side is unknown"
    },
    split="none",
    read=read,
)
