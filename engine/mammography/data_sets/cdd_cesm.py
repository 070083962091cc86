"""CDD-CESM: contrast-enhanced mammograms, a low-energy image (DM) and a subtracted one (CESM) of each view, as JPEG."""

from __future__ import annotations

import math
from typing import Any

from ...datasets.tables import values
from ...datasets.tables.schema import Finding
from ...errors import DataError
from ...parsing import parse_json
from .files import DataSet, Files, Records, unlabelled_record

_TABLES = (
    "Radiology manual annotations.xlsx",
    "Radiology-manual-annotations.xlsx",
    "Radiology_manual_annotations.xlsx",
    "Radiology-manual-annotations.csv",
)
_OUTLINES = ("Radiology_hand_drawn_segmentations_v2.csv", "Radiology_hand_drawn_segmentations.csv")
_FOLDERS = {"DM": "Low energy images of CDD-CESM", "CESM": "Subtracted images of CDD-CESM"}
_PATHOLOGY = "Pathology Classification/ Follow up"


def read(files: Files) -> Records:
    """One record per image; several rows of an image (one per lesion) are merged."""
    table = files.rows(*_TABLES, sheet="all")
    table.require("Image_name", "Patient_ID", "Side", "Type", "View", _PATHOLOGY)
    outlines = _outlines(files)
    images: dict[str, list[dict[str, str]]] = {}
    for row in table.rows:
        if row["Image_name"]:
            images.setdefault(row["Image_name"], []).append(row)
    for name, rows in images.items():
        first = rows[0]
        classes = {row[_PATHOLOGY].lower() for row in rows if row[_PATHOLOGY]}
        grades = [g for row in rows for part in row.get("BIRADS", "").split("$") if (g := values.birads(part))]
        findings = [text.strip() for row in rows for text in row.get("Findings", "").split("$") if text.strip()]
        folder = _FOLDERS.get(first["Type"].upper(), "")
        yield unlabelled_record(
            path=files.expect(f"{folder}/{name}.jpg"),
            patient_id=first["Patient_ID"],
            laterality=values.side(first["Side"]),
            view=first["View"].upper(),
            exam_id=first["Patient_ID"],
            density=next((d for row in rows if (d := values.density(row.get("Breast density (ACR)", "")))), None),
            birads=max(grades, default=None),
            manufacturer=first.get("Machine") or None,
            labels={"malignant": float("malignant" in classes), "abnormal": float(bool(classes - {"normal"}))}
            if classes
            else {},
            findings=tuple(outlines.get(name, ())),
            extra={"type": first["Type"], "findings_text": ", ".join(dict.fromkeys(findings))},
        )


def _outlines(files: Files) -> dict[str, list[Finding]]:
    """Regions drawn with the VGG Image Annotator, by image."""
    if files.table(*_OUTLINES) is None:
        return {}
    table = files.rows(*_OUTLINES)
    table.require("#filename", "region_shape_attributes")
    found: dict[str, list[Finding]] = {}
    for place, row in zip(table.places, table.rows, strict=True):
        try:
            finding = _finding(parse_json(row["region_shape_attributes"] or "{}"))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{table.path}, {place}: damaged region_shape_attributes ({error}); correct it") from error
        if finding:
            name = row["#filename"].rsplit(".", 1)[0].strip()
            found.setdefault(name, []).append(finding)
    return found


def _finding(shape: dict[str, Any]) -> Finding | None:
    kind = shape.get("name")
    if kind in ("polygon", "polyline"):
        rows, columns = shape["all_points_y"], shape["all_points_x"]
        outline = tuple((float(y), float(x)) for y, x in zip(rows, columns, strict=True))
        return Finding(box=values.box_around(min(rows), max(rows), min(columns), max(columns)), outline=outline)
    if kind == "rect":
        return Finding(
            box=values.box_around(shape["y"], shape["y"] + shape["height"], shape["x"], shape["x"] + shape["width"])
        )
    if kind in ("circle", "ellipse"):
        ry, rx = (shape["r"],) * 2 if kind == "circle" else (shape["ry"], shape["rx"])
        turn = shape.get("theta", 0.0)  # the rotation of an ellipse after drawing
        ry, rx = (
            math.hypot(rx * math.sin(turn), ry * math.cos(turn)),
            math.hypot(rx * math.cos(turn), ry * math.sin(turn)),
        )
        return Finding(box=values.box_around(shape["cy"] - ry, shape["cy"] + ry, shape["cx"] - rx, shape["cx"] + rx))
    if kind == "point":
        return Finding(box=values.box_around(shape["cy"], shape["cy"], shape["cx"], shape["cx"]))
    return None


DATA_SET = DataSet(
    name="cdd-cesm",
    title="CDD-CESM",
    tables=_TABLES,
    rules={
        "malignant": "1 if pathology or follow-up is Malignant, 0 if Benign or Normal",
        "abnormal": "1 if pathology or follow-up is Malignant or Benign, 0 if Normal",
    },
    split="none",
    read=read,
)
