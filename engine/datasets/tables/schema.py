"""What is known of an image, whatever data set it is from: `Record`; and the csv file that holds records."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...files import write_atomically
from ...images.levels import White
from .cells import EXCEL, escape
from .parquet import PARQUET

SPLITS = ("train", "val", "test")
LABEL_PREFIX = "label_"
"""Columns with this prefix are label columns: `label_cancer` is `labels["cancer"]`."""

Box = tuple[int, int, int, int]
"""Top, bottom, left, right in pixels of the file as stored, before any mirroring; ends excluded."""


@dataclass(frozen=True)
class Finding:
    """One annotated place in an image, in pixels of the file as stored; what a data set does not give is empty."""

    kind: str = ""
    """mass, calcification, asymmetry, ... in lower case, as the data set names it."""
    box: Box | None = None
    outline: tuple[tuple[float, float], ...] = ()
    """Corners (row, column) of a closed polygon."""
    mask: Path | None = None
    """An image of the same size that is not zero inside the finding."""
    pathology: str = ""
    """malignant, benign, ... in lower case."""
    birads: str = ""

    def to_json(self, folder: Path) -> dict[str, Any]:
        """Plain values without what is empty; paths below `folder` are relative to it."""
        values: dict[str, Any] = {"kind": self.kind, "box": self.box, "outline": self.outline}
        values |= {"mask": relative(self.mask, folder) if self.mask else "", "pathology": self.pathology}
        values["birads"] = self.birads
        return {name: value for name, value in values.items() if value}

    @classmethod
    def from_json(cls, values: dict[str, Any], folder: Path) -> Finding:
        """The inverse of `to_json`. KeyError, TypeError, ValueError or OverflowError if they are of another form."""
        unknown = set(values) - {"kind", "box", "outline", "mask", "pathology", "birads"}
        if unknown:
            raise ValueError(f"unknown entry {sorted(unknown)[0]!r}")
        box = values.get("box")
        if box is not None:
            top, bottom, left, right = (int(side) for side in box)
            if not (0 <= top < bottom and 0 <= left < right):
                raise ValueError(f"box {box} is not top, bottom, left, right")
            box = top, bottom, left, right
        outline = tuple((float(row), float(column)) for row, column in values.get("outline", ()))
        if not all(math.isfinite(side) for point in outline for side in point):
            raise ValueError("an outline is not finite")
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
    """Index into the table's classes; -1 where the image has no label."""
    patient_id: str
    split: str | None = None
    """train, val or test; None where the table does not say."""
    laterality: str | None = None
    """L or R."""
    view: str | None = None
    """CC, MLO, ML, ...; PA or AP of chest radiographs."""
    extra: dict[str, str] = field(default_factory=dict, compare=False)
    """All other columns, as they stand in the file."""
    exam_id: str | None = None
    density: str | None = None
    """A, B, C or D (BI-RADS)."""
    birads: str | None = None
    """0, 1, 2, 3, 4, 4A, 4B, 4C, 5 or 6."""
    manufacturer: str | None = None
    labels: dict[str, float] = field(default_factory=dict, compare=False)
    """Label columns by name; a label that is not known of this image is absent."""
    findings: tuple[Finding, ...] = ()
    frame: int | None = None
    """Which frame of a file that has several, from 0."""
    white: White | None = None
    """The stored value that is white, or "auto", as in `open_pixels`; None where the table does not say."""
    patient_known: bool = field(default=True, compare=False)
    """False where nothing says who the patient is, and the image stands for a patient of its own."""
    chest_wall: str | None = None
    """left or right: where the chest wall lies in the file; None where header and pixels are to say."""


@dataclass(frozen=True)
class Table:
    """Records and the names of their classes."""

    records: list[Record]
    classes: list[str]
    """Class names in the order of the labels; empty where the table was read without labels."""
    label_rule: str = ""
    """What the label means, where a reader of a public data set made it."""
    name: str = ""
    """Of the public data set, as in `DATA_SETS`."""
    masks: list[Path] = field(default_factory=list)
    """Files of a folder without labels that are left out, because they are masks by their names."""


READING = ("frame", "white", "chest_wall")
"""Columns that say which pixels of a file are read, and how."""


def reading_of(record: Record) -> dict[str, str]:
    """The cells of the columns `READING` that a record fills."""
    white = "" if record.white is None else _plain(record.white)
    cells = ("" if record.frame is None else str(record.frame), white, record.chest_wall or "")
    return {name: cell for name, cell in zip(READING, cells, strict=True) if cell}


def write_table(path: str | Path, records: Sequence[Record], classes: Sequence[str]) -> Path:
    """Write records as a csv file that `read_table` reads back; returns its path.

    Columns that no record fills are left out; paths below the csv's folder are relative to it. Records with label -1
    get an empty label, with which `read_table` can only read them as images to predict.
    Raises `GigamorphError` if the file cannot be written; a former one is kept.
    """
    path = require_csv(path)
    folder = Path(os.path.abspath(path)).parent
    rows = [_row(record, classes, folder) for record in records]
    present = {name for row in rows for name, value in row.items() if value != ""}
    names = dict.fromkeys(name for row in rows for name in row)  # in order of appearance
    columns = [name for name in names if name in present or name in ("image_path", "label", "patient_id")]

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: escape(cell) for name, cell in row.items()} for row in rows)

    try:
        write_atomically(path, write, "table")
    except UnicodeEncodeError as error:
        odd = error.object[max(error.start - 40, 0) : error.end + 40].encode(errors="backslashreplace").decode().strip()
        raise DataError(f"{path}: cannot be written: {odd} is not in UTF-8; rename the file") from error
    return path


def require_csv(path: str | Path) -> Path:
    """The path of a table that is to be written; `DataError` if its name says that it is no csv."""
    if str(path).lower().endswith((PARQUET, *EXCEL)):
        raise DataError(f"{path}: would be a csv by another name; end it in .csv")
    return Path(path)


def relative(path: Path, folder: Path) -> str:
    """`path` from `folder` on if it lies below, else as an absolute path; with slashes on every system."""
    path = Path(os.path.abspath(path))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _plain(value: float | str) -> str:
    """A number in full, whole ones without a point; text as it is."""
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
        # Who reads this again sees that the image stands for its patient.
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
