"""INbreast: full-field digital mammograms with outlines; patients are in the file names only, no pathology."""

from __future__ import annotations

import plistlib
import re
from pathlib import Path

from ...datasets.tables import values
from ...datasets.tables.schema import Finding
from ...errors import DataError
from .files import DataSet, Files, Records, unlabelled_record

_POINT = re.compile(r"\(\s*([-\d.eE+]+)\s*,\s*([-\d.eE+]+)\s*\)")


def read(files: Files) -> Records:
    """One record per row of INbreast.csv or .xls; findings from AllXML."""
    table = files.rows("INbreast.csv", "INbreast.xls", "INbreast.xlsx")
    table.require("File Name", "Laterality", "View", "Bi-Rads")
    images = {path.name.split("_")[0]: path for path in files.matching([".dcm"]) if "_MG_" in path.name}
    outlines = {path.stem: path for path in files.matching([".xml"])}
    for row in table.rows:
        number = row["File Name"].split("_")[0].removesuffix(".dcm")
        if not number.isdecimal():  # notes below the table
            continue
        image = images.get(number)
        # FILE_PATIENT_MG_SIDE_VIEW_ANON.dcm
        parts = image.name.split("_") if image else []
        patient = parts[1] if len(parts) > 2 else number
        grade = values.birads(row["Bi-Rads"])
        yield unlabelled_record(
            path=image or files.folder / "AllDICOMs" / f"{number}.dcm",
            patient_id=patient,
            laterality=values.side(row["Laterality"]),
            view=row["View"].upper() or None,
            exam_id=f"{patient}_{row.get('Acquisition date', '')}",
            density=values.density(row.get("ACR", "")),
            birads=grade,
            labels=_labels(grade),
            findings=_outlines(outlines[number]) if number in outlines else (),
        )


def _labels(grade: str | None) -> dict[str, float]:
    suspicious = values.suspicious(grade)
    if suspicious is None:
        return {}
    labels = {"suspicious": suspicious}
    return labels if grade == "3" else {**labels, "suspicious_without_3": suspicious}


def _outlines(path: Path) -> tuple[Finding, ...]:
    """The outlines in an Apple property list: Images[0].ROIs[] with Name and Point_px, "(x, y)" each."""
    try:
        images = plistlib.loads(path.read_bytes())["Images"]
        rois = [roi for image in images for roi in image["ROIs"]]
        found = []
        for roi in rois:
            points = [match for text in roi["Point_px"] if (match := _POINT.fullmatch(text.strip()))]
            corners = tuple((float(match[2]), float(match[1])) for match in points)
            if corners:
                kind = str(roi.get("Name", "")).strip().lower()
                rows, columns = zip(*corners, strict=True)
                box = values.box_around(min(rows), max(rows), min(columns), max(columns))
                found.append(Finding(kind=kind, box=box, outline=corners if len(corners) > 2 else ()))
    except Exception as error:  # a damaged property list raises errors of many kinds
        raise DataError(f"{path}: damaged outlines ({' '.join(str(error).split())}); download it again") from error
    return tuple(found)


DATA_SET = DataSet(
    name="inbreast",
    title="INbreast",
    tables=("INbreast.csv", "INbreast.xls", "INbreast.xlsx"),
    rules={
        "suspicious": "1 for BI-RADS 4 to 6, 0 for BI-RADS 1 to 3 (there is no pathology)",
        "suspicious_without_3": "1 for BI-RADS 4 to 6, 0 for BI-RADS 1 and 2; images of BI-RADS 3 have no label "
        "and are left out (Shen et al., 2019)",
    },
    split="none",
    read=read,
)
