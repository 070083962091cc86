"""RSNA Screening Mammography Breast Cancer Detection (2023): cancer per breast, proven by biopsy."""

from __future__ import annotations

from ...datasets.tables import values
from ...errors import DataError
from .files import DataSet, Files, Records, unlabelled_record

_LABELS = ("cancer", "biopsy", "invasive", "difficult_negative_case")
_KEPT = ("site_id", "age", "implant", "machine_id")


def read(files: Files) -> Records:
    """One record per row of train.csv or, if it is missing, of test.csv, which has no labels."""
    table = files.rows("train.csv", "test.csv")
    table.require("patient_id", "image_id", "laterality", "view")
    folder = f"{table.path.name.split('.')[0]}_images"
    for place, row in zip(table.places, table.rows, strict=True):
        labels = {name: _truth(row[name], name, f"{table.path}, {place}") for name in _LABELS if row.get(name)}
        yield unlabelled_record(
            path=files.expect(f"{folder}/{row['patient_id']}/{row['image_id']}.dcm"),
            patient_id=row["patient_id"],
            laterality=values.side(row["laterality"]),
            view=row["view"].upper(),
            exam_id=row["patient_id"],
            density=values.density(row.get("density", "")),
            birads=values.birads(row.get("BIRADS", "").removesuffix(".0")),
            labels={name: value for name, value in labels.items() if value is not None},
            extra={name: row[name] for name in _KEPT if row.get(name)},
        )


def _truth(cell: str, name: str, place: str) -> float | None:
    """1 or 0 for "1", "0.0", "True", ...; None for nan."""
    value = values.number({"true": "1", "false": "0"}.get(cell.lower(), cell))
    if value not in (0, 1, None) or (value is None and cell.lower() != "nan"):
        raise DataError(f"{place}: {name} {cell!r} must be 0 or 1; download the table again")
    return value


DATA_SET = DataSet(
    name="rsna",
    title="RSNA 2023",
    tables=("train.csv", "test.csv"),
    rules={
        "cancer": "1 if the breast has a cancer proven by biopsy, 0 if not",
        "biopsy": "1 if the breast was biopsied, 0 if not",
        "invasive": "1 if the cancer is invasive, 0 if there is none or it is not",
        "difficult_negative_case": "1 for a difficult negative, 0 otherwise",
    },
    split="none (the competition's test set is hidden)",
    read=read,
    columns=("patient_id", "image_id", "laterality", "view"),
)
