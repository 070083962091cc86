"""Tables of images: a csv file, or a folder with a sub-folder per class, as a list of records."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}
_SUFFIXES = {".dcm", ".dicom", ".png", ".tif", ".tiff", ".npy", ""}
_COLUMNS = {"image_path", "label", "patient_id", "split", "laterality", "view"}


@dataclass(frozen=True)
class Record:
    """One image of a table."""

    path: Path
    label: int
    """Index into the table's classes; -1 where the table was read without labels."""
    patient_id: str
    split: str | None = None
    """train, val or test; None where the table does not say."""
    laterality: str | None = None
    """L or R."""
    view: str | None = None
    """CC, MLO, ..."""
    extra: dict[str, str] = field(default_factory=dict, compare=False)
    """All other columns, as they stand in the file."""


@dataclass(frozen=True)
class Table:
    """Records and the names of their classes."""

    records: list[Record]
    classes: list[str]
    """Class names in the order of the labels; empty where the table was read without labels."""


def read_table(
    path: str | Path, *, labels: bool = True, classes: Sequence[str] | None = None, check_files: bool = True
) -> Table:
    """Read a csv file or a folder-per-class tree.

    csv: columns image_path (relative to the csv's folder), label, patient_id, and as you like split, laterality, view
    and others; separated by commas, semicolons or tabs. Labels 0, 1, ... are kept; other labels are names, numbered in
    sorted order. Folder: [train|val|test/]CLASS/[PATIENT/]image; without patient folders each image is a patient.

    labels: False reads images to predict: label and patient_id are not needed, and labels are -1.
    classes: the class names of a trained model, so that labels get the model's numbers.
    check_files: refuse tables that name files which do not exist.

    Raises `DataError`, in one line that names the file and the place in it.
    """
    path = Path(path)
    if path.is_dir():
        rows = _folder_rows(path, labels)
    elif path.is_file():
        rows = _csv_rows(path, labels)
    else:
        raise DataError(f"{path}: no such file or folder")
    if not rows:
        raise DataError(f"{path}: holds no images; expected rows below the header, or a sub-folder of images per class")
    names = _class_names([row["label"] for _, row in rows], classes, path) if labels else []
    numbers = {name: number for number, name in enumerate(names)}
    records = []
    for place, row in rows:
        if labels and row["label"] not in numbers:
            raise DataError(f"{path}, {place}: label {row['label']!r} is none of the classes {', '.join(names)}")
        records.append(_record(path, place, row, numbers[row["label"]] if labels else -1))
    _refuse_duplicates(path, rows, records)
    if check_files:
        _refuse_missing(path, records)
    return Table(records, names)


def missing_files(records: Sequence[Record]) -> list[Path]:
    """The paths of records whose file does not exist."""
    return [record.path for record in records if not record.path.is_file()]


def _csv_rows(path: Path, labels: bool) -> list[tuple[str, dict[str, str]]]:
    """(place for messages, row) of every line below the header; names and cells are stripped."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            separator = max(",;\t", key=first.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header, labels)
            rows = []
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                place = f"line {reader.line_num}"
                if len(cells) != len(header):
                    raise DataError(f"{path}, {place}: has {len(cells)} cells, the header {len(header)}")
                rows.append((place, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not a csv file in UTF-8 ({error}); save it as one") from error
    needed = ["image_path", "label", "patient_id"] if labels else ["image_path"]
    for place, row in rows:
        for name in needed:
            if not row[name]:
                raise DataError(f"{path}, {place}: {name} is empty")
    return rows


def _check_header(path: Path, header: list[str], labels: bool) -> None:
    if not any(header):
        raise DataError(f"{path}: is empty; the first line must name the columns: image_path,label,patient_id,split")
    needed = ["image_path", "label", "patient_id"] if labels else ["image_path"]
    missing = [name for name in needed if name not in header]
    if missing:
        raise DataError(f"{path}: column {', '.join(missing)} is missing; it has {', '.join(header)}")
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: column {twice[0]} is there twice; rename one")


def _folder_rows(path: Path, labels: bool) -> list[tuple[str, dict[str, str]]]:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not labels:
        return [(str(file), {"image_path": str(file)}) for file in _images(path)]
    if folders and all(folder.name.lower() in _SPLIT_NAMES for folder in folders):
        return [row for folder in folders for row in _class_rows(folder, folder.name)]
    return _class_rows(path, "")


def _class_rows(path: Path, split: str) -> list[tuple[str, dict[str, str]]]:
    rows = []
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        for file in _images(folder):
            inside = file.relative_to(folder).parts
            # The same stem in two splits or classes is another patient, unless folders name the patients.
            patient = inside[0] if len(inside) > 1 else str(file)
            row = {"image_path": str(file), "label": folder.name, "patient_id": patient, "split": split}
            rows.append((str(file), row))
    return rows


def _images(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
    ]


def _class_names(labels: list[str], classes: Sequence[str] | None, path: Path) -> list[str]:
    if classes is not None:
        return [str(name) for name in classes]
    found = set(labels)
    if all(label.isdecimal() for label in found):
        names = [str(number) for number in range(max(int(label) for label in found) + 1)]
        absent = [name for name in names if name not in found]
        if found <= {"0", "1"}:  # one class may be absent from a small table
            return ["0", "1"]
        if absent or found - set(names):
            raise DataError(
                f"{path}: labels {_few(sorted(found))} leave out {_few(absent)}; number classes from 0, or name them"
            )
        return names
    return sorted(found)


def _record(path: Path, place: str, row: dict[str, str], label: int) -> Record:
    split = row.get("split", "").lower()
    if split and split not in _SPLIT_NAMES:
        raise DataError(f"{path}, {place}: split {row['split']!r} is none of {', '.join(SPLITS)}")
    side = row.get("laterality", "").upper()
    side = {"LEFT": "L", "RIGHT": "R"}.get(side, side)
    if side not in ("", "L", "R"):
        raise DataError(f"{path}, {place}: laterality {row['laterality']!r} is neither L nor R")
    image = Path(row["image_path"])
    return Record(
        path=image if path.is_dir() else path.parent / image,
        label=label,
        patient_id=row.get("patient_id") or row["image_path"],
        split=_SPLIT_NAMES.get(split),
        laterality=side or None,
        view=row.get("view", "").upper() or None,
        extra={name: value for name, value in row.items() if name not in _COLUMNS},
    )


def _refuse_duplicates(path: Path, rows: list[tuple[str, dict[str, str]]], records: list[Record]) -> None:
    seen: dict[Path, str] = {}
    for (place, _), record in zip(rows, records, strict=True):
        if record.path in seen:
            raise DataError(f"{path}, {place}: {record.path.name} is already in {seen[record.path]}; keep one of them")
        seen[record.path] = place


def _refuse_missing(path: Path, records: list[Record]) -> None:
    missing = missing_files(records)
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(records)} images do not exist: {_few([str(p) for p in missing])}"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
