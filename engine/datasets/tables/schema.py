"""The schema of tables: `Record`, the data of one image of any data set, and the csv file of records."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import DataError
from ...images.levels import White
from .cells import EXCEL, PARQUET, write_csv

SPLITS = ("train", "val", "test")
LABEL_PREFIX = "label_"
"""The prefix of label columns: `label_cancer` is `labels["cancer"]`."""

Box = tuple[int, int, int, int]
"""Top, bottom, left, right in pixels of the stored file, before any mirroring; ends excluded."""


@dataclass(frozen=True)
class Finding:
    """An annotated region of an image, in pixels of the stored file; unknown fields are empty."""

    kind: str = ""
    """mass, calcification, asymmetry, ... in lower case, with the data set's name."""
    box: Box | None = None
    outline: tuple[tuple[float, float], ...] = ()
    """Corners (row, column) of a closed polygon."""
    mask: Path | None = None
    """An image of the same size, non-zero inside the finding."""
    pathology: str = ""
    """malignant, benign, ... in lower case."""
    birads: str = ""

    def to_json(self, folder: Path) -> dict[str, Any]:
        """The non-empty fields as plain values; paths below `folder` are relative to it."""
        values: dict[str, Any] = {"kind": self.kind, "box": self.box, "outline": self.outline}
        values |= {"mask": relative(self.mask, folder) if self.mask else "", "pathology": self.pathology}
        values["birads"] = self.birads
        return {name: value for name, value in values.items() if value}

    @classmethod
    def from_json(cls, values: dict[str, Any], folder: Path) -> Finding:
        """The inverse of `to_json`; raises KeyError, TypeError, ValueError or OverflowError for malformed values."""
        unknown = set(values) - {"kind", "box", "outline", "mask", "pathology", "birads"}
        if unknown:
            raise ValueError(f"unknown entry {sorted(unknown)[0]!r}")
        box = values.get("box")
        if box is not None:
            top, bottom, left, right = (int(side) for side in box)
            if not (0 <= top < bottom and 0 <= left < right):
                raise ValueError(f"box {box} must be top, bottom, left, right")
            box = top, bottom, left, right
        outline = tuple((float(row), float(column)) for row, column in values.get("outline", ()))
        if not all(math.isfinite(side) for point in outline for side in point):
            raise ValueError("outlines must be finite")
        return cls(
            kind=str(values.get("kind", "")),
            box=box,
            outline=outline,
            mask=folder / values["mask"] if values.get("mask") else None,
            pathology=str(values.get("pathology", "")),
            birads=str(values.get("birads", "")),
        )


@dataclass(frozen=True)
class Record:
    """One image of a table."""

    path: Path
    label: int
    """The index into the table's classes; -1 without a label."""
    patient_id: str
    split: str | None = None
    """train, val or test; None if the table has no split."""
    laterality: str | None = None
    """L or R."""
    view: str | None = None
    """CC, MLO, ML, ...; PA or AP of chest radiographs."""
    extra: dict[str, str] = field(default_factory=dict, compare=False)
    """All other columns, unchanged."""
    exam_id: str | None = None
    density: str | None = None
    """A, B, C or D (BI-RADS)."""
    birads: str | None = None
    """0, 1, 2, 3, 4, 4A, 4B, 4C, 5 or 6."""
    manufacturer: str | None = None
    labels: dict[str, float] = field(default_factory=dict, compare=False)
    """Label columns by name; unknown labels are absent."""
    findings: tuple[Finding, ...] = ()
    frame: int | Literal["all"] | None = None
    """The frame of a file with several frames, from 0, or "all" for a volume of all frames."""
    white: White | None = None
    """The stored value of white, or "auto", as in `open_pixels`; None if the table has none."""
    patient_known: bool = field(default=True, compare=False)
    """False if the patient is unknown; the image then counts as a patient."""
    chest_wall: str | None = None
    """The side of the chest wall in the file, left or right; None if header and pixels determine it."""

    def __str__(self) -> str:
        """The file, for messages."""
        return str(self.path)


@dataclass(frozen=True)
class Table:
    """Records and the names of their classes."""

    records: list[Record]
    classes: list[str]
    """Class names in the order of the labels; empty if the table was read without labels."""
    label_rule: str = ""
    """The meaning of the label of a public data set."""
    name: str = ""
    """The name of the public data set, as in `DATA_SETS`."""
    masks: list[Path] = field(default_factory=list)
    """Files of a folder without labels that were left out because their names are names of masks."""


READING = ("frame", "white", "chest_wall")
"""Columns that control which pixels of a file are read, and how."""


def reading_of(record: Record) -> dict[str, str]:
    """The non-empty cells of a record in the columns `READING`."""
    white = "" if record.white is None else _plain(record.white)
    cells = ("" if record.frame is None else str(record.frame), white, record.chest_wall or "")
    return {name: cell for name, cell in zip(READING, cells, strict=True) if cell}


def write_table(path: str | Path, records: Sequence[Record], classes: Sequence[str]) -> Path:
    """Write records as a csv file for `read_table`, and return its path.

    Empty columns are left out; paths below the csv's folder are relative to it. Records with label -1 get an empty
    label; `read_table` reads them only as images to predict.

    Raises:
        GigamorphError: if the file cannot be written; an existing file is unchanged.
    """
    path = require_csv(path)
    folder = Path(os.path.abspath(path)).parent
    rows = [_row(record, classes, folder) for record in records]
    present = {name for row in rows for name, value in row.items() if value != ""}
    names = dict.fromkeys(name for row in rows for name in row)  # in order of appearance
    columns = [name for name in names if name in present or name in ("image_path", "label", "patient_id")]
    try:
        write_csv(path, columns, ([row.get(name, "") for name in columns] for row in rows), "\n")
    except UnicodeEncodeError as error:
        odd = error.object[max(error.start - 40, 0) : error.end + 40].encode(errors="backslashreplace").decode().strip()
        raise DataError(f"{path}: cannot be written: {odd} is not in UTF-8; rename the file") from error
    return path


def require_csv(path: str | Path) -> Path:
    """The path of a table to write; `DataError` if its suffix is that of another format."""
    if str(path).lower().endswith((PARQUET, *EXCEL)):
        raise DataError(f"{path}: tables are written as csv; the name must end in .csv")
    return Path(path)


def relative(path: Path, folder: Path) -> str:
    """`path` relative to `folder` if it is below, else the absolute path; with slashes on all systems."""
    path = Path(os.path.abspath(path))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _plain(value: float | str) -> str:
    """A number at full precision, integers without a point; text is unchanged."""
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _row(record: Record, classes: Sequence[str], folder: Path) -> dict[str, str]:
    findings = [finding.to_json(folder) for finding in record.findings]
    label = "" if record.label < 0 else classes[record.label] if classes else str(record.label)
    reading = reading_of(record)
    return {
        "image_path": relative(record.path, folder),
        "frame": reading.get("frame", ""),
        "label": label,
        # The path in this column marks an unknown patient for later readers.
        "patient_id": record.patient_id if record.patient_known else relative(record.path, folder),
        "split": record.split or "",
        "laterality": record.laterality or "",
        "view": record.view or "",
        "exam_id": record.exam_id or "",
        "density": record.density or "",
        "birads": record.birads or "",
        "manufacturer": record.manufacturer or "",
        "white": reading.get("white", ""),
        "chest_wall": reading.get("chest_wall", ""),
        "findings": json.dumps(findings) if findings else "",
        **{LABEL_PREFIX + name: _plain(value) for name, value in record.labels.items() if not math.isnan(value)},
        **record.extra,
    }
