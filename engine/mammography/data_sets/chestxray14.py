"""NIH ChestX-ray14: 112,120 frontal chest radiographs as PNG, with 14 findings mined from reports."""

from __future__ import annotations

from pathlib import Path

from ...datasets.tables import values
from ...datasets.tables.schema import Box, Finding
from ...errors import DataError
from .files import DataSet, Files, Records, unlabelled_record

FINDINGS = tuple(
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration Mass Nodule "
    "Pleural_Thickening Pneumonia Pneumothorax".split()
)
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "nih_Data_Entry_2017_v2020.csv")


def read(files: Files) -> Records:
    """One record per row of Data_Entry_2017.csv, of either release.

    The commas in two column names are not quoted, so "OriginalImage[Width,Height]" is read as two columns.
    """
    table = files.rows(*_TABLES)
    table.require("Image Index", "Finding Labels", "Patient ID", "View Position")
    splits = _splits(files)
    boxes = _boxes(files)
    for place, row in zip(table.places, table.rows, strict=True):
        found = set(row["Finding Labels"].split("|")) - {"No Finding"}
        if found - set(FINDINGS):
            raise DataError(f"{table.path}, {place}: unknown finding {sorted(found - set(FINDINGS))[0]!r}; correct it")
        name = row["Image Index"]
        yield unlabelled_record(
            path=files.expect(f"images/{name}"),
            patient_id=row["Patient ID"],
            split=splits.get(name),
            view=row["View Position"],
            exam_id=f"{row['Patient ID']}_{row.get('Follow-up #', '')}",
            labels={"finding": float(bool(found)), **{kind: float(kind in found) for kind in FINDINGS}},
            findings=tuple(boxes.get(name, ())),
            extra={
                "age": row.get("Patient Age", "").rstrip("Y").lstrip("0") or "0",
                "sex": row.get("Patient Gender") or row.get("Patient Sex", ""),
            },
        )


def _splits(files: Files) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        path = files.table(name) if files.path.is_dir() else None
        for image in [] if path is None else _lines(path):
            if found.setdefault(image, split) != split:
                raise DataError(f"{path}: {image} is also in train_val_list.txt; download both again")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a list of image names ({error}); download it again") from error


def _boxes(files: Files) -> dict[str, list[Finding]]:
    """The boxes in BBox_List_2017.csv; its header splits "Bbox [x,y,w,h]" into four columns and adds empty ones."""
    if files.path.is_file() or files.table("BBox_List_2017.csv") is None:
        return {}
    table = files.rows("BBox_List_2017.csv")
    found: dict[str, list[Finding]] = {}
    for place, row in zip(table.places, table.rows, strict=True):
        cells = list(row.values())
        sides = [values.number(cell) for cell in cells[2:6]]
        if len(sides) < 4 or None in sides:
            raise DataError(f"{table.path}, {place}: has no box x, y, w, h; download the table again")
        x, y, width, height = (side for side in sides if side is not None)
        box: Box = (max(round(y), 0), round(y + height), max(round(x), 0), round(x + width))
        found.setdefault(cells[0], []).append(Finding(kind=cells[1].lower(), box=box))
    return found


DATA_SET = DataSet(
    name="chestxray14",
    title="NIH ChestX-ray14",
    tables=_TABLES,
    rules={
        "finding": "1 if the report names any of the 14 findings, 0 for No Finding",
        **{kind: f"1 if the report names {kind}, 0 if not" for kind in FINDINGS},
    },
    split="train_val_list.txt is train and test_list.txt is test, where they were downloaded",
    read=read,
)
