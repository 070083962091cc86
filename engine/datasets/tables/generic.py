"""Tables of one's own: a csv file, or a folder with a sub-folder per class, as a list of records."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import DataError
from ...images.levels import White, parse_white
from ...parsing import is_whole, parse_json
from ..unknown_views import GROUP_COLUMNS, unplaced, unplaced_line
from . import values
from .cells import is_number, no_number, read_rows
from .folders import Unlisted, image_files, walk
from .mask_names import masks_among, names_masks
from .schema import LABEL_PREFIX, SPLITS, Finding, Record, Table
from .skipped import CONVERTED, is_left_out, log, made_by, tell_unread

SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}
# What other tools call our columns.
_ALIASES = {"dicom_path": "image_path", "study_id": "exam_id"}
_COLUMNS = {
    *("image_path", "label", "patient_id", "exam_id", "split", "laterality", "view"),
    *("density", "birads", "manufacturer", "findings", "mask_path", "frame", "white", "chest_wall"),
}


def read_table(
    path: str | Path,
    *,
    labels: bool = True,
    label: str | None = None,
    classes: Sequence[str] | None = None,
    check_files: bool = True,
    skip_missing: bool = False,
) -> Table:
    """Read a csv file or a folder-per-class tree.

    csv: columns image_path (relative to the csv's folder), label, patient_id, and as you like the others of `Record`
    (frame, exam_id, split, laterality, view, density, birads, manufacturer, white, chest_wall, findings as JSON,
    mask_path, label_NAME), and any of one's own; separated by commas, semicolons or tabs. Labels 0, 1, ... are kept;
    other labels are names, numbered in sorted order. Folder: [train|val|test/]CLASS/[PATIENT/]image; without patient
    folders each image is a patient.

    labels: False reads images to predict: label and patient_id are not needed, and labels are -1; files of a folder
    that are masks by their names are left out.
    label: a label column, ``label_NAME``, that becomes the label; images in whose row it is empty have label -1.
    classes: the class names of a trained model, so that labels get the model's numbers.
    check_files: refuse tables that name files which do not exist. skip_missing: leave out their images instead.

    Raises `DataError`, in one line that names the file and the place in it.
    """
    path, masks = Path(path), []
    if path.is_dir() and not labels:
        files = image_files(path)
        masks = masks_among(files, path)
        left_out = set(masks)
        rows = [(str(file), {"image_path": str(file)}) for file in files if file not in left_out]
    elif path.is_dir():
        rows = _folder_rows(path)
    elif path.is_file():
        rows = _csv_rows(path, labels, label)
    else:
        raise DataError(f"{path}: no such file or folder")
    if not rows:
        if path.is_dir():
            raise DataError(
                f"{path}: holds no images in a sub-folder per class; gigamorph data index makes a table of a folder, "
                "to which you add the column label"
            )
        raise DataError(f"{path}: holds no images: there are no rows below the header")
    names = _class_names([row["label"] for _, row in rows if row["label"]], classes, path) if labels else []
    numbers = {name: number for number, name in enumerate(names)}
    records = []
    for place, row in rows:
        if labels and row["label"] and row["label"] not in numbers:
            raise DataError(f"{path}, {place}: label {row['label']!r} is none of the classes {', '.join(names)}")
        records.append(to_record(path, place, row, numbers.get(row["label"], -1) if labels else -1))
    _refuse_duplicates(path, rows, records)
    _warn_of_unplaced(path, [place for place, _ in rows], records)
    if skip_missing:
        return Table(skip_absent(path, records), names, masks=masks)
    if check_files:
        _refuse_missing(path, records)
    return Table(records, names, masks=masks)


def labels_of(path: Path, table: Table) -> list[str]:
    """The label of each image of a table that was read, also without labels; empty where it is not known.

    Args:
        path: where it was read: a csv file, of which this is the column label as it stands there, or a folder.
    """
    if path.is_file():
        return [whole(row.get("label", "")) for _, row in _csv_rows(path, False, None)]
    return [table.classes[record.label] if record.label >= 0 else "" for record in table.records]


def label_columns(path: str | Path, records: Sequence[Record], wanted: Sequence[str] = ()) -> list[str]:
    """The names, without label_, of a table's label columns that are not empty.

    Raises `DataError` if there are none, or one that is wanted is not among them; it says which columns there are.
    """
    there = list(dict.fromkeys(name for record in records for name in record.labels))
    absent = [name for name in wanted if name not in there]
    if there and not absent:
        return there
    column = LABEL_PREFIX + (absent or ["NAME"])[0]
    if Path(path).is_dir():
        raise DataError(f"{path}: has no column {column}, as it is a folder; gigamorph data index makes a table of it")
    header = read_rows(Path(path), fallback=None).header
    if empty := [name for name in header if name == column or (not absent and name.startswith(LABEL_PREFIX))]:
        raise DataError(f"{path}: column {empty[0]} is empty; fill it in where the label is known")
    raise DataError(f"{path}: has no column {column}; it has {', '.join(header)}")


def skip_absent(path: str | Path, records: Sequence[Record]) -> list[Record]:
    """Records whose file exists; `DataError` if none does."""
    missing = set(missing_files(records))
    if len(missing) == len({record.path for record in records}):
        first = _few(sorted(str(file) for file in missing))
        raise DataError(f"{path}: none of the {len(records)} images exists: {first}; download them")
    return [record for record in records if record.path not in missing]


def missing_files(records: Sequence[Record]) -> list[Path]:
    """The paths of records whose file does not exist."""
    return [record.path for record in records if is_absent(record.path)]


def is_absent(path: Path) -> bool:
    """Whether a file does not exist; one that cannot be asked for is there, and reading it tells why."""
    try:
        return not path.exists()
    except OSError:
        return False


def missing_masks(records: Sequence[Record]) -> list[Path]:
    """The masks of findings that do not exist."""
    return [f.mask for record in records for f in record.findings if f.mask is not None and not f.mask.exists()]


def without_masks(records: Sequence[Record], masks: Sequence[Path]) -> list[Record]:
    """Records whose findings are the same but for some masks."""
    absent = set(masks)
    return [
        replace(record, findings=tuple(replace(f, mask=None) if f.mask in absent else f for f in record.findings))
        for record in records
    ]


def own_name(name: str, found: Sequence[str]) -> str:
    """A column by our name, however it is capitalised, with blanks for underscores, and whatever other tools call it;
    not where that is there too."""
    plain = _plain(name)
    own = _ALIASES.get(plain, plain if plain in _COLUMNS else name)
    others = [_plain(other) for other in found if other != name]
    return name if own.lower() in others else own


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_")


def columns_of(path: Path, found: Sequence[str], labels: bool, label: str | None) -> tuple[list[str], list[str]]:
    """A table's columns by our names, and those that no row may leave empty; `DataError` if one is missing."""
    header = [own_name(name, found) for name in found]
    others = [name.removeprefix(LABEL_PREFIX) for name in header if name.startswith(LABEL_PREFIX)]
    if label is not None and label not in others:
        raise DataError(f"{path}: has no column {LABEL_PREFIX}{label}; it has {', '.join(header)}")
    needed = ["image_path", "label", "patient_id"] if labels else ["image_path"]
    if label is not None:
        needed.remove("label")
    missing = [name for name in needed if name not in header]
    if missing == ["label"] and others:
        raise DataError(
            f"{path}: column label is missing; make one of label_{', label_'.join(others)} the label: gigamorph data "
            f"convert {path} --label {others[0]} --out FOLDER"
        )
    if missing:
        raise DataError(
            f"{path}: column {', '.join(missing)} is missing; it has {', '.join(header)} "
            "(tables of public data sets: gigamorph data convert)"
        )
    return header, needed


def _csv_rows(path: Path, labels: bool, label: str | None) -> list[tuple[str, dict[str, str]]]:
    """(place for messages, row) of every line below the header; names and cells are stripped."""
    table = read_rows(path, fallback=None)
    header, needed = columns_of(path, table.header, labels, label)
    rows = [dict(zip(header, row.values(), strict=True)) for row in table.rows]
    for place, row in zip(table.places, rows, strict=True):
        for name in needed:
            if not row[name] or (name == "patient_id" and _filled(row, name) is None):
                raise DataError(f"{path}, {place}: {name} is {row[name] or 'empty'}; fill it in, or leave the row out")
        if labels:
            row["label"] = whole(row["label"] if label is None else row[LABEL_PREFIX + label])
    return list(zip(table.places, rows, strict=True))


def _folder_rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    if made_by(path) == CONVERTED and (path / "table.csv").is_file():
        raise DataError(
            f"{path}: holds what gigamorph {CONVERTED} wrote, not a sub-folder per class; name its table, "
            f"{path / 'table.csv'}"
        )
    folders = _sub_folders(path)
    if folders and all(folder.name.lower() in SPLIT_NAMES for folder in folders):
        return [row for folder in folders for row in _class_rows(folder, _sub_folders(folder), folder.name)]
    return _class_rows(path, folders, "")


def _sub_folders(path: Path) -> list[Path]:
    there = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(there) > 1 and all(made_by(folder) == CONVERTED for folder in there):  # each class was converted alone
        return there
    return [folder for folder in there if not is_left_out(folder)]


def _class_rows(path: Path, folders: list[Path], split: str) -> list[tuple[str, dict[str, str]]]:
    rows = []
    for folder in folders:
        if len(folders) > 1 and names_masks(folder.name):
            raise DataError(
                f"{folder}: holds masks by its name, and would be a class; rename or move it, or make a table of the "
                "images: gigamorph data index"
            )
        # A link to another class does not make its images this one's.
        files, unread = [], Counter[str]()
        for entry in walk(folder, {os.path.realpath(other) for other in (path, *folders)}, unread):
            if isinstance(entry, Unlisted):  # a training does not do without images in silence
                raise entry.error
            files.append(entry)
        tell_unread(folder, unread)
        masks = masks_among(files, folder)
        if masks:
            told = "1 file is a mask by its name" if len(masks) == 1 else f"{len(masks)} files are masks by their names"
            raise DataError(f"{folder}: {told}, the first {masks[0]}; move masks out of the folders of classes")
        for file in files:
            inside = file.relative_to(folder).parts
            # The same stem in two splits or classes is another patient, unless folders name the patients.
            patient = inside[0] if len(inside) > 1 else str(file)
            row = {"image_path": str(file), "label": folder.name, "patient_id": patient, "split": split}
            rows.append((str(file), row))
    return rows


def _class_names(labels: list[str], classes: Sequence[str] | None, path: Path) -> list[str]:
    if classes is not None:
        return [str(name) for name in classes]
    found = set(labels)
    if not found:
        raise DataError(f"{path}: no image has a label; fill the column in")
    odd = [label for label in sorted(found) if label.lower() == "nan"]
    unknown = {label for label in found if label.lower() in _UNKNOWN}
    if unknown != found and all(is_number(_pointed(label)) for label in found - unknown):
        odd += [label for label in sorted(found) if not is_whole(label)]
    if odd:
        raise DataError(
            f"{path}: label {odd[0]} is no class; number classes 0, 1, ... or name them, leave rows of unknown label "
            "out, and make classes of a score by a threshold"
        )
    if all(map(is_whole, found)):
        most = len(found) + _FEW + 1  # of labels that leave numbers out the first are named
        names = [str(number) for number in range(min(max(map(int, found)) + 1, most))]
        absent = [name for name in names if name not in found]
        if found <= {"0", "1"}:  # one class may be absent from a small table
            return ["0", "1"]
        if absent or found - set(names):
            there = json.dumps(sorted(found, key=int)) if len(found) <= _NAMED else "[...]"
            raise DataError(
                f"{path}: labels {_few(sorted(found))} leave out {_few(absent)}; number classes from 0, or name all "
                f"that there are: -o 'data.classes={there}'"
            )
        return names
    return sorted(found)


_FEW = 3
_NAMED = 12  # classes that a message names
_NOTHING = ("nan", "#n/a", "none", "null")
"""What Python, Excel and SQL write where nothing is known."""
_UNKNOWN = (*_NOTHING, "na", "n/a", "?")
"""What R and people write besides; among names it may be one, and someone's initials."""


def _pointed(label: str) -> str:
    """A number with a comma as its decimal sign, as 1,0, with a point; other labels as they are."""
    before, comma, after = label.partition(",")
    return f"{before}.{after}" if comma and before.lstrip("-").isdecimal() and after.isdecimal() else label


def whole(label: str) -> str:
    """A whole number without its point, or comma, as tables write it that had empty cells: 1 of 1.0."""
    pointed = _pointed(label)
    number = float(pointed) if is_number(pointed) else math.nan
    return str(int(number)) if math.isfinite(number) and number.is_integer() and "." in pointed else label


def to_record(path: Path, place: str, row: dict[str, str], label: int) -> Record:
    """A row of a table as a record; `DataError` with its place where a cell holds what it cannot."""
    split = row.get("split", "").lower()
    if split and split not in SPLIT_NAMES:
        raise DataError(f"{path}, {place}: split {row['split']!r} is none of {', '.join(SPLITS)}")
    side = values.side(_filled(row, "laterality") or "")
    if _filled(row, "laterality") and side is None:
        raise DataError(f"{path}, {place}: laterality {row['laterality']!r} is neither L nor R")
    frame = whole(_filled(row, "frame") or "")
    if frame and not is_whole(frame):
        raise DataError(f"{path}, {place}: frame {row['frame']!r} is no number from 0")
    if row.get("chest_wall", "").lower() not in ("", "left", "right"):
        raise DataError(f"{path}, {place}: chest_wall {row['chest_wall']!r} is neither left nor right")
    folder = Path() if path.is_dir() else path.parent
    patient = _filled(row, "patient_id") or row["image_path"]
    return Record(
        path=_placed(folder, row["image_path"]),
        label=label,
        patient_id=patient,
        patient_known=patient != row["image_path"],
        split=SPLIT_NAMES.get(split),
        laterality=side,
        view=row.get("view", "").upper() or None,
        extra={
            name: value for name, value in row.items() if name not in _COLUMNS and not name.startswith(LABEL_PREFIX)
        },
        exam_id=_filled(row, "exam_id"),
        density=_spelt(values.density, row.get("density", "")),
        birads=_spelt(values.birads, row.get("birads", "")),
        manufacturer=row.get("manufacturer") or None,
        labels=_labels(path, place, row),
        findings=_findings(path, place, row),
        frame=int(frame) if frame else None,
        white=_white(path, place, row),
        chest_wall=row.get("chest_wall", "").lower() or None,
    )


def _filled(row: dict[str, str], column: str) -> str | None:
    """What a row says in a column; nothing where programs wrote that nothing is known."""
    return known(row.get(column, "")) or None


def known(text: str) -> str:
    """A cell, empty where programs wrote that nothing is known (nan, None)."""
    return "" if text.lower() in _NOTHING else text


def _spelt(spelling: Callable[[str], str | None], text: str) -> str | None:
    """As the schema spells it, also where a column with empty cells made 3.0 of 3; a word of the table's own stays."""
    return spelling(text.removesuffix(".0")) or text or None


def _placed(folder: Path, name: str) -> Path:
    """A file that a table names, also as Windows writes it."""
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
            number = values.number(cell)
            if number is None:
                told = no_number(cell, "leave it empty where it is not known")
                raise DataError(f"{path}, {place}: {name} {told}")
            found[name.removeprefix(LABEL_PREFIX)] = number
    return found


def _findings(path: Path, place: str, row: dict[str, str]) -> tuple[Finding, ...]:
    found = []
    if row.get("findings"):
        try:
            found = [Finding.from_json(item, path.parent) for item in parse_json(row["findings"])]
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(f"{path}, {place}: findings are not a JSON list of findings ({error})") from error
    if row.get("mask_path"):
        found.append(Finding(mask=_placed(path.parent, row["mask_path"])))
    return tuple(found)


def _refuse_duplicates(path: Path, rows: list[tuple[str, dict[str, str]]], records: list[Record]) -> None:
    seen: dict[tuple[str, int | None], str] = {}
    for (place, _), record in zip(rows, records, strict=True):
        image = os.path.realpath(record.path), record.frame  # also where a link leads
        if image in seen:
            raise DataError(f"{path}, {place}: {record.path.name} is already in {seen[image]}; keep one of them")
        seen[image] = place


def _warn_of_unplaced(path: Path, places: Sequence[str], records: Sequence[Record]) -> None:
    patients = [record.patient_id if record.patient_known else "" for record in records]
    for column in GROUP_COLUMNS:
        if found := unplaced(patients, [getattr(record, column) or "" for record in records]):
            first = f"{records[found[0]].path}, {places[found[0]]}"
            log.warning("%s: %s", path, unplaced_line(column, len(found), first))


def _refuse_missing(path: Path, records: list[Record]) -> None:
    missing = missing_files(records)
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(records)} images do not exist: {_few([str(p) for p in missing])}; "
            "put them there, or take them out"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")
