"""Tables of users: a csv file, or a folder with a sub-folder per class, as a list of records."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

from ...errors import DataError
from ...images.levels import White, parse_white
from ...parsing import is_whole, parse_json
from ..unknown_views import GROUP_COLUMNS, unplaced, unplaced_line
from . import folders, values
from .cells import EXCEL, PARQUET, is_number, no_number, stream_rows
from .schema import LABEL_PREFIX, SPLITS, Finding, Record, Table

TABLES = (".csv", ".tsv", ".txt", ".csv.gz", PARQUET, *EXCEL)
"""Suffixes of tables."""
SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}
# Names of our columns in other tools.
_ALIASES = {"dicom_path": "image_path", "study_id": "exam_id"}
_COLUMNS = {
    *("image_path", "label", "patient_id", "exam_id", "split", "laterality", "view"),
    *("density", "birads", "manufacturer", "findings", "mask_path", "frame", "white", "chest_wall"),
}
_POINT_ZERO = re.compile(r"(\d+)\.0+")
_given: ContextVar[tuple[Mapping[str, str], set[str]]] = ContextVar("columns")  # names, and those that tables had


@contextmanager
def columns_named(names: Mapping[str, str]) -> Iterator[set[str]]:
    """Read tables whose columns have other names, inside the block.

    Args:
        names: our name -> name in the tables, as in ``{"label": "cancer", "image_path": "Datei"}``; capitals and blanks
            matter only if they differ in nothing else. Another column that has our name is renamed to ``other NAME``.

    Returns:
        Our names of the columns that tables have had so far.

    Raises:
        DataError: if one of our names is not a column that tables have, or a column gets two names.
    """
    before, used = _given.get(({}, set()))
    given = {**before, **names}
    theirs = list(map(_plain, given.values()))
    for name, other in names.items():
        if name not in _COLUMNS and not name.startswith(LABEL_PREFIX):
            own = ", ".join(sorted(_COLUMNS))
            raise DataError(f"column {name}={other}: {name} must be one of {own}, or begin with {LABEL_PREFIX}")
        if not other or theirs.count(_plain(other)) > 1:
            raise DataError(f"column {name}={other}: name one column, and copy it in the table to read it as two")
    token = _given.set((given, used))
    try:
        yield used
    finally:
        _given.reset(token)


def read_table(
    path: str | Path,
    *,
    labels: bool = True,
    label: str | None = None,
    classes: Sequence[str] | None = None,
    check_files: bool = True,
    skip_missing: bool = False,
    repeated: bool = False,
) -> Table:
    """Read a csv file or a folder-per-class tree.

    csv: required columns image_path (relative to the csv's folder), label and patient_id; optional columns of `Record`
    (frame, exam_id, split, laterality, view, density, birads, manufacturer, white, chest_wall, findings as JSON,
    mask_path, label_NAME) and any others; separated by commas, semicolons or tabs. Labels 0, 1, ... are kept; other
    labels are names, numbered in sorted order. For other names of columns see `columns_named`. Identical rows are read
    once, with a warning.

    Folder: [train|val|test/]CLASS/[PATIENT/]image; without patient folders each image is a patient.

    Args:
        path: the csv file or folder.
        labels: False reads images to predict: label and patient_id are optional, labels are -1, and files of a folder
            whose names are names of masks are left out.
        label: the NAME of a label column ``label_NAME`` to use as the label; images with an empty cell have label -1.
        classes: the class names of a trained model, so that labels get the model's numbers.
        check_files: whether missing image files raise an error.
        skip_missing: leaves missing image files out instead.
        repeated: whether an image may be in several rows, each of which is a record.

    Raises:
        DataError: names the file and the line.
    """
    path, masks = Path(path), []
    if path.is_dir() and not labels:
        files = folders.image_files(path)
        masks = folders.masks_among(files, path)
        left_out = set(masks)
        rows = [(str(file), {"image_path": str(file)}) for file in files if file not in left_out]
    elif path.is_dir():
        rows = list(_folder_rows(path))
    elif path.is_file():
        rows = list(_csv_rows(path, labels, label))
    else:
        raise DataError(f"{path}: no such file or folder")
    if not rows:
        if path.is_dir():
            raise DataError(
                f"{path}: contains no images in a sub-folder per class; make a table with gigamorph data index, and "
                "add the column label (data convert --label none needs no labels)"
            )
        raise DataError(f"{path}: contains no images: the table has no rows below the header")
    if not repeated:
        rows = _without_copies(path, rows)
    names = _class_names([row["label"] for _, row in rows if row["label"]], classes, path) if labels else []
    numbers = {name: number for number, name in enumerate(names)}
    records = []
    for place, row in rows:
        if labels and row["label"] and row["label"] not in numbers:
            raise DataError(f"{path}, {place}: unknown label {row['label']!r}; the classes are {', '.join(names)}")
        records.append(to_record(path, place, row, numbers.get(row["label"], -1) if labels else -1))
    if not repeated:
        _refuse_duplicates(path, rows, records)
    _warn_of_unplaced(path, [place for place, _ in rows], records)
    if skip_missing:
        return Table(skip_absent(path, records), names, masks=masks)
    if check_files:
        _refuse_missing(path, records)
    return Table(records, names, masks=masks)


def stream_table(path: Path, classes: Sequence[str] | None, unknown: Counter[str]) -> Iterator[tuple[str, Record]]:
    """Iterate over (cell image_path, record) of the rows of a csv, Parquet or Excel file; records as in `read_table`.

    In contrast to `read_table`, an image may be in several rows, and files need not exist.

    Args:
        path: the file.
        classes: the class names; a label becomes the index of its class, or -1. None reads no labels.
        unknown: counts the labels that are not classes.

    Raises:
        DataError: names the file and line of a problem; also during iteration.
    """
    numbers = {name: number for number, name in enumerate(classes or ())}
    for place, row in _csv_rows(path, False, None):
        label = -1
        if classes is not None and row.get("label"):
            label = numbers.get(whole(row["label"]), -1)
            if label < 0:
                unknown[row["label"]] += 1
        yield row["image_path"], to_record(path, place, row, label)


def labels_of(path: Path, table: Table) -> list[str]:
    """The label of each image of a table, also of one that was read without labels; empty if it is unknown.

    Args:
        path: the csv file (the result is its column label, unchanged) or folder of the table.
        table: the table.
    """
    if path.is_file():
        return [whole(row.get("label", "")) for _, row in _csv_rows(path, False, None)]
    return [table.classes[record.label] if record.label >= 0 else "" for record in table.records]


def label_columns(path: str | Path, records: Sequence[Record], wanted: Sequence[str] = ()) -> list[str]:
    """The names, without label_, of a table's non-empty label columns.

    Raises:
        DataError: if there is no label column, or a wanted one is missing; lists the columns of the table.
    """
    there = list(dict.fromkeys(name for record in records for name in record.labels))
    absent = [name for name in wanted if name not in there]
    if there and not absent:
        return there
    column = LABEL_PREFIX + (absent or ["NAME"])[0]
    if Path(path).is_dir():
        raise DataError(f"{path}: a folder has no column {column}; make a table of it: gigamorph data index")
    header = stream_rows(Path(path))[0]
    if empty := [name for name in header if name == column or (not absent and name.startswith(LABEL_PREFIX))]:
        raise DataError(f"{path}: column {empty[0]} is empty; fill in the known labels")
    raise DataError(f"{path}: has no column {column}; it has {', '.join(header)}")


def skip_absent(path: str | Path, records: Sequence[Record]) -> list[Record]:
    """The records whose file exists; `DataError` if none exists."""
    missing = set(missing_files(records))
    if len(missing) == len({record.path for record in records}):
        first = _first_names(sorted(str(file) for file in missing))
        raise DataError(f"{path}: none of the {len(records)} images exists: {first}; download them")
    return [record for record in records if record.path not in missing]


def missing_files(records: Sequence[Record]) -> list[Path]:
    """The paths of records whose file does not exist."""
    return [record.path for record in records if is_absent(record.path)]


def is_absent(path: Path) -> bool:
    """Whether a file does not exist; False if this cannot be determined, because reading then reports the reason."""
    try:
        return not path.exists()
    except OSError:
        return False


def missing_masks(records: Sequence[Record]) -> list[Path]:
    """The masks of findings whose file does not exist."""
    return [f.mask for record in records for f in record.findings if f.mask is not None and not f.mask.exists()]


def without_masks(records: Sequence[Record], masks: Sequence[Path]) -> list[Record]:
    """The records without these masks in their findings."""
    absent = set(masks)
    return [
        replace(record, findings=tuple(replace(f, mask=None) if f.mask in absent else f for f in record.findings))
        for record in records
    ]


def own_names(found: Sequence[str]) -> list[str]:
    """Our names of a table's columns: any capitals, blanks for underscores, and names of other tools are recognised.

    A name is unchanged if another column already has our name; names of `columns_named` take precedence.
    """
    given, plain = _renamed(found), Counter(map(_plain, found))

    def own_name(name: str) -> str:
        if name in given:
            return given[name]
        own = _ALIASES.get(_plain(name), _plain(name) if _plain(name) in _COLUMNS else name)
        if own in given.values():
            return f"other {name}"
        return name if plain[own.lower()] > (own.lower() == _plain(name)) else own

    return list(map(own_name, found))


def _renamed(found: Sequence[str]) -> dict[str, str]:
    """Our names of a table's columns by `columns_named`; an exact spelling precedes others."""
    renamed: dict[str, str] = {}
    given, used = _given.get(({}, set()))
    for ours, theirs in given.items():
        fitting = [theirs] if theirs in found else [name for name in found if _plain(name) == _plain(theirs)]
        if len(fitting) > 1:
            raise DataError(f"columns {' and '.join(fitting)} could be {ours}={theirs}; write the name as in the table")
        used.update([ours] if fitting else [])
        renamed |= dict.fromkeys(fitting, ours)
    return renamed


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_")


def columns_of(path: Path, found: Sequence[str], labels: bool, label: str | None) -> tuple[list[str], list[str]]:
    """A table's columns by our names, and the columns that must not be empty; `DataError` if one is missing."""
    for ours, theirs in _given.get(({}, set()))[0].items():
        if ours not in _renamed(found).values():
            raise DataError(f"{path}: has no column {theirs}, to be read as {ours}; it has {', '.join(found)}")
    header = own_names(found)
    others = [name.removeprefix(LABEL_PREFIX) for name in header if name.startswith(LABEL_PREFIX)]
    if label is not None and label not in others:
        raise DataError(f"{path}: has no column {LABEL_PREFIX}{label}; it has {', '.join(header)}")
    needed = ["image_path", "label", "patient_id"] if labels else ["image_path"]
    if label is not None:
        needed.remove("label")
    missing = [name for name in needed if name not in header]
    if missing == ["label"] and others:
        raise DataError(
            f"{path}: column label is missing; use one of label_{', label_'.join(others)} as the label: gigamorph data "
            f"convert {path} --label {others[0]} --out FOLDER"
        )
    if missing:
        raise DataError(
            f"{path}: column {', '.join(missing)} is missing; it has {', '.join(header)} "
            f"(name it with --column {missing[0]}=COLUMN; tables of public data sets: gigamorph data convert)"
        )
    return header, needed


def _csv_rows(path: Path, labels: bool, label: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    """(line for messages, row) of each line below the header; names and cells are stripped."""
    found, rows = stream_rows(path)
    header, needed = columns_of(path, found, labels, label)
    for place, cells in rows:
        row = dict(zip(header, cells.values(), strict=True))
        for name in needed:
            if not row[name] or (name == "patient_id" and _known_cell(row, name) is None):
                raise DataError(f"{path}, {place}: {name} is {row[name] or 'empty'}; fill it in, or remove the row")
        if labels:
            row["label"] = whole(row["label"] if label is None else row[LABEL_PREFIX + label])
        yield place, row


def _folder_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    if folders.made_by(path) == folders.CONVERTED and (path / "table.csv").is_file():
        raise DataError(
            f"{path}: contains the output of gigamorph {folders.CONVERTED}, not a sub-folder per class; use its table, "
            f"{path / 'table.csv'}"
        )
    below = _sub_folders(path)
    if below and all(folder.name.lower() in SPLIT_NAMES for folder in below):
        for folder in below:
            yield from _class_rows(folder, _sub_folders(folder), folder.name)
    else:
        yield from _class_rows(path, below, "")


def _sub_folders(path: Path) -> list[Path]:
    there = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    # Each class may have been converted separately.
    if len(there) > 1 and all(folders.made_by(folder) == folders.CONVERTED for folder in there):
        return there
    return [folder for folder in there if not folders.is_left_out(folder)]


def _class_rows(path: Path, below: list[Path], split: str) -> Iterator[tuple[str, dict[str, str]]]:
    for folder in below:
        if len(below) > 1 and folders.names_masks(folder.name):
            raise DataError(
                f"{folder}: has the name of a folder of masks, but would be a class; rename or move it, or make a "
                "table of the images: gigamorph data index"
            )
        # Links to the folder of another class are not followed.
        files, unread = [], Counter[str]()
        for entry in folders.walk(folder, {os.path.realpath(other) for other in (path, *below)}, unread):
            if isinstance(entry, folders.Unlisted):  # training must not skip images silently
                raise entry.error
            files.append(entry)
        folders.warn_of_unread(folder, unread)
        masks = folders.masks_among(files, folder)
        if masks:
            found = "1 file has the name of a mask" if len(masks) == 1 else f"{len(masks)} files have names of masks"
            raise DataError(f"{folder}: {found}, the first {masks[0]}; move masks out of the folders of classes")
        for file in files:
            inside = file.relative_to(folder).parts
            # Equal stems in two splits or classes are different patients, unless folders name the patients.
            patient = inside[0] if len(inside) > 1 else str(file)
            yield str(file), {"image_path": str(file), "label": folder.name, "patient_id": patient, "split": split}


def _class_names(labels: list[str], classes: Sequence[str] | None, path: Path) -> list[str]:
    if classes is not None:
        return [str(name) for name in classes]
    found = set(labels)
    if not found:
        raise DataError(f"{path}: no image has a label; fill in the column label")
    odd = [label for label in sorted(found) if label.lower() == "nan"]
    unknown = {label for label in found if label.lower() in _UNKNOWN}
    if unknown != found and all(is_number(_with_point(label)) for label in found - unknown):
        odd += [label for label in sorted(found) if not is_whole(label)]
    if odd:
        raise DataError(
            f"{path}: label {odd[0]} is not a class; number classes 0, 1, ... or name them, remove rows without a "
            "label, and turn scores into classes by a threshold"
        )
    if all(map(is_whole, found)):
        most = len(found) + _FEW + 1  # enough to name the first missing numbers
        names = [str(number) for number in range(min(max(map(int, found)) + 1, most))]
        absent = [name for name in names if name not in found]
        if found <= {"0", "1"}:  # a small table may lack one class
            return ["0", "1"]
        if absent or found - set(names):
            there = json.dumps(sorted(found, key=int)) if len(found) <= _NAMED else "[...]"
            raise DataError(
                f"{path}: labels {_first_names(sorted(found))} lack {_first_names(absent)}; number classes from 0, or "
                f"name all classes: -o 'data.classes={there}'"
            )
        return names
    return sorted(found)


_FEW = 3
_NAMED = 12  # the maximum number of classes in a message
_NOTHING = ("nan", "#n/a", "none", "null")
"""Unknown values as Python, Excel and SQL write them."""
_UNKNOWN = (*_NOTHING, "na", "n/a", "?")
"""Also those of R and people; among names, "na" may be a name or initials."""


def _with_point(label: str) -> str:
    """A number with a decimal comma, as 1,0, with a point instead; other labels are unchanged."""
    before, comma, after = label.partition(",")
    return f"{before}.{after}" if comma and before.lstrip("-").isdecimal() and after.isdecimal() else label


def whole(label: str) -> str:
    """An integer without decimals: "1" for "1.0" and "1,0", as tables with empty cells write it."""
    pointed = _with_point(label)
    number = float(pointed) if is_number(pointed) else math.nan
    return str(int(number)) if math.isfinite(number) and number.is_integer() and "." in pointed else label


def identifier(cell: str) -> str:
    """A patient or exam without the decimals that other programs append (``5004.0``); empty for an unknown value."""
    text = known(cell)
    found = _POINT_ZERO.fullmatch(text)
    return found[1] if found else text


def to_record(path: Path, place: str, row: dict[str, str], label: int) -> Record:
    """A row of a table as a record; a `DataError` names the line of an invalid cell."""
    split = row.get("split", "").lower()
    if split and split not in SPLIT_NAMES:
        raise DataError(f"{path}, {place}: split {row['split']!r} must be one of {', '.join(SPLITS)}")
    side = values.side(_known_cell(row, "laterality") or "")
    if _known_cell(row, "laterality") and side is None:
        raise DataError(f"{path}, {place}: laterality {row['laterality']!r} must be L or R")
    frame = whole(_known_cell(row, "frame") or "").lower()
    if frame not in ("", "all") and not is_whole(frame):
        raise DataError(f"{path}, {place}: frame {row['frame']!r} must be a number from 0, or all for a volume")
    if row.get("chest_wall", "").lower() not in ("", "left", "right"):
        raise DataError(f"{path}, {place}: chest_wall {row['chest_wall']!r} must be left or right")
    folder = Path() if path.is_dir() else path.parent
    patient = identifier(row.get("patient_id", "")) or row["image_path"]
    return Record(
        path=_existing_path(folder, row["image_path"]),
        label=label,
        patient_id=patient,
        patient_known=patient != row["image_path"],
        split=SPLIT_NAMES.get(split),
        laterality=side,
        view=row.get("view", "").upper() or None,
        extra={
            name: value for name, value in row.items() if name not in _COLUMNS and not name.startswith(LABEL_PREFIX)
        },
        exam_id=identifier(row.get("exam_id", "")) or None,
        density=_normalized(values.density, row.get("density", "")),
        birads=_normalized(values.birads, row.get("birads", "")),
        manufacturer=row.get("manufacturer") or None,
        labels=_labels(path, place, row),
        findings=_findings(path, place, row),
        frame="all" if frame == "all" else int(frame) if frame else None,
        white=_white(path, place, row),
        chest_wall=row.get("chest_wall", "").lower() or None,
    )


def _known_cell(row: dict[str, str], column: str) -> str | None:
    """The cell of a column; None if it is empty or an unknown value (nan, None)."""
    return known(row.get(column, "")) or None


def known(text: str) -> str:
    """A cell; empty for an unknown value (nan, None)."""
    return "" if text.lower() in _NOTHING else text


def _normalized(spelling: Callable[[str], str | None], text: str) -> str | None:
    """The spelling of the schema, also for 3.0 instead of 3; other words are unchanged."""
    return spelling(text.removesuffix(".0")) or text or None


def _existing_path(folder: Path, name: str) -> Path:
    """The path of a file in a table; backslashes of Windows are replaced if the file does not exist otherwise."""
    path = folder / name
    return folder / name.replace("\\", "/") if "\\" in name and is_absent(path) else path


def _white(path: Path, place: str, row: dict[str, str]) -> White | None:
    try:
        return parse_white(row["white"]) if row.get("white") else None
    except DataError as error:
        raise DataError(f"{path}, {place}: {error}") from error


def _labels(path: Path, place: str, row: dict[str, str]) -> dict[str, float]:
    found = {}
    for name, cell in row.items():
        if name.startswith(LABEL_PREFIX) and cell and cell.lower() != "nan":
            number = values.label(cell)
            if number is None:
                reason = no_number(cell, "leave it empty if it is unknown")
                raise DataError(f"{path}, {place}: {name} {reason}")
            found[name.removeprefix(LABEL_PREFIX)] = number
    return found


def _findings(path: Path, place: str, row: dict[str, str]) -> tuple[Finding, ...]:
    found = []
    if row.get("findings"):
        try:
            found = [Finding.from_json(item, path.parent) for item in parse_json(row["findings"])]
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(f"{path}, {place}: findings must be a JSON list of findings ({error})") from error
    if row.get("mask_path"):
        found.append(Finding(mask=_existing_path(path.parent, row["mask_path"])))
    return tuple(found)


def _without_copies(path: Path, rows: list[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    """The rows without copies of earlier rows, of which a warning is logged."""
    first: dict[tuple[str, ...], tuple[str, dict[str, str]]] = {}
    copies = [place for place, row in rows if first.setdefault(tuple(row.values()), (place, row))[0] != place]
    if copies:
        what = "1 row is a copy" if len(copies) == 1 else f"{len(copies)} rows are copies"
        folders.log.warning("%s: %s of an earlier row and left out, the first in %s", path, what, copies[0])
    return list(first.values())


def _refuse_duplicates(path: Path, rows: list[tuple[str, dict[str, str]]], records: list[Record]) -> None:
    seen: dict[tuple[str, int | str | None], str] = {}
    twice = []
    for (place, _), record in zip(rows, records, strict=True):
        image = os.path.realpath(record.path), record.frame  # follows links
        if seen.setdefault(image, place) != place:
            twice.append(f"{place}: {record.path.name} is already in {seen[image]}")
    if twice:
        others = f" ({len(twice) - 1} more: gigamorph data check lists all)" if len(twice) > 1 else ""
        raise DataError(f"{path}, {twice[0]}; keep one of them{others}")


def _warn_of_unplaced(path: Path, places: Sequence[str], records: Sequence[Record]) -> None:
    patients = [record.patient_id if record.patient_known else "" for record in records]
    for column in GROUP_COLUMNS:
        if found := unplaced(patients, [getattr(record, column) or "" for record in records]):
            first = f"{records[found[0]].path}, {places[found[0]]}"
            folders.log.warning("%s: %s", path, unplaced_line(column, len(found), first))


def _refuse_missing(path: Path, records: list[Record]) -> None:
    missing = missing_files(records)
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(records)} images do not exist: "
            f"{_first_names([str(p) for p in missing])}; add the files, or remove the rows"
        )


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")
