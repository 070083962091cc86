"""Reads predictions from csv files of gigamorph predict, or other files with columns of labels and scores."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.splits import check_leaks
from ..datasets.tables import SPLITS, Record, read_table
from ..datasets.tables.cells import Rows, read_rows, write_csv
from ..datasets.tables.generic import SPLIT_NAMES, identifier, own_names, whole
from ..datasets.tables.values import box_around, number, side
from ..datasets.unknown_views import unplaced, unplaced_line
from ..errors import DataError
from ..parsing import parse_json
from . import odds
from .cases import Array, Cases, Level
from .class_names import in_order, positive_of
from .froc import Marked
from .join import KEYS, frame_of, join, place_of

ODDS, PROBABILITY, SCORE, VALUE, LABEL = "log_odds_", "p_", "score_", "value_", "label_"
ImageKey = tuple[str, str]
"""Path and frame; "" if frames are not distinguished."""
_NAMES: dict[Level, str] = {"image": "image_path", "breast": "breast", "exam": "exam"}
"""The column with the names of the rows, which identifies the level of a table."""


@dataclass(frozen=True)
class TableParts:
    """The rows of a table by purpose.

    Attributes:
        measured: the measured rows.
        validation: rows of split val, the only ones for fitting; None if there are none.
        rows: numbers of "measured" and "left_out" rows by split; "" for rows without a split.
        warnings: warnings about the rows, one line each.
    """

    measured: Cases
    validation: Cases | None
    rows: dict[str, dict[str, int]]
    warnings: tuple[str, ...] = ()


def read_cases(path: str | Path, **options: Any) -> Cases:
    """The measured rows; arguments and errors are those of `read_parts`."""
    return read_parts(path, **options).measured


def read_parts(
    path: str | Path,
    *,
    table: str | Path | None = None,
    label: str | None = None,
    score: str | None = None,
    split: str | None = None,
    classes: Sequence[str] | None = None,
) -> TableParts:
    """The images (or breasts or exams) of a csv with truth and scores, including those without a label.

    Scores are the columns log_odds_NAME, else p_NAME (rounded in older files, with ties), else score_NAME, which only
    rank. The truth is the column label (name of the class, or 1 and 0), or for several labels the columns label_NAME.
    Columns value_NAME are predicted numbers, with truth label_NAME.

    Args:
        path: of the csv.
        table: csv of the images, joined by image_path, or to breasts and exams by patient, exam and side. It provides
            missing labels of images, and columns for subgroups.
        label: column of the truth, 1 or 0, instead of the default.
        score: column of the score, instead of the default: log-odds in log_odds_NAME; probabilities of label 1 (or of
            the class NAME of p_NAME) if all values are from 0 to 1; else any number that is larger for 1, which only
            ranks.
        split: measured splits: train, val or test, several separated by commas, or "all" except train. None requires
            that the file has only one split, other than train.
        classes: names of three or more classes, the lowest first; by default in the order of the training.

    Raises:
        DataError: with file and line, for errors in columns, labels or scores, or a patient in two splits.
    """
    path = Path(path)
    rows = _read(path)
    if table is not None:
        join(rows, _read(Path(table)), Path(table))
    measured, counts = _choose_split(rows, split)
    validation = [n for n, row in enumerate(rows.rows) if row.get("split") == "val"]
    used = sorted({*measured, *validation})
    _keep_rows(rows, used)
    cases = _cases(rows, label, score)
    if classes is not None:
        cases = _stated(cases, tuple(classes), path)
    own = [bool(n) for n in np.isin(used, measured)]
    chosen = cases.where(np.isin(used, validation)) if validation else None
    return TableParts(cases.where(own), chosen, counts, tuple(_warnings(rows, cases)))


def _stated(cases: Cases, classes: tuple[str, ...], path: Path) -> Cases:
    """The cases with classes in the stated order."""
    if cases.kind != "classes":
        raise DataError(f"{path}: does not have three or more classes; omit --classes")
    if sorted(classes) != sorted(cases.outputs):
        raise DataError(f"{path}: has the classes {', '.join(cases.outputs)}; list each once in --classes")
    return replace(cases.in_order(classes), ordered=True)


def _warnings(rows: Rows, cases: Cases) -> Iterator[str]:
    """Warnings about images that cannot be assigned to a breast or exam."""
    if cases.level != "image":
        return
    for column, values in (("laterality", cases.sides), ("exam_id", cases.exams)):
        if found := unplaced(cases.patients, values):
            first = f"{cases.names[found[0]]}, {rows.places[found[0]]}"
            yield f"{rows.path}: {unplaced_line(column, len(found), first)}"


def _cases(rows: Rows, label: str | None, score: str | None) -> Cases:
    scored = _scores(rows, score, label)
    if score is None and any(name.startswith(VALUE) for name in rows.header):
        names = scored.names
        fields = {
            "kind": "numbers",
            "outputs": tuple(names),
            "truth": _measured(rows, label, names),
            "scores": scored.values,
        }
    else:
        fields = _truth(rows, label, scored)
    keys = {key: tuple(row.get(key, "") for row in rows.rows) for key in KEYS}
    levels: list[Level] = [level for level, column in _NAMES.items() if column in rows.header]
    level = levels[0] if levels else "image"
    used = {*_NAMES.values(), *KEYS, *(c for c in rows.header if c.startswith((ODDS, PROBABILITY, SCORE, VALUE)))}
    return Cases(
        **fields,
        names=tuple(
            row.get(_NAMES[level]) or f"{rows.path}, {place}" for row, place in zip(rows.rows, rows.places, strict=True)
        ),
        patients=keys["patient_id"],
        exams=keys["exam_id"],
        sides=keys["laterality"],
        level=level,
        probable=scored.probable,
        columns={
            name: tuple(row[name] for row in rows.rows)
            for name in (*rows.header, "laterality")
            if name in rows.header and (name not in used or name == "laterality")
        },
    )


def write_cases(path: str | Path, cases: Cases) -> Path:
    """Write cases for `read_cases`, with all digits of scores; returns the path."""
    path = Path(path)
    outputs, truth, scores = list(cases.outputs), cases.truth, cases.scores
    if cases.kind == "binary" and cases.probable:
        outputs, scores = [f"not_{outputs[0]}", outputs[0]], np.concatenate([-scores, scores], 1)
    several = cases.kind in ("labels", "numbers")
    label_columns = [LABEL + name for name in outputs] if several else ["label"]
    further = [name for name in cases.columns if name not in (*KEYS, *label_columns)]
    prefix = VALUE if cases.kind == "numbers" else ODDS if cases.probable else SCORE
    score_columns = [prefix + name for name in outputs]

    labels = truth if several else cases.labels[:, None]
    rows = []
    for i, name in enumerate(cases.names):
        known = ["" if np.isnan(v) or (v < 0 and not several) else digits(v) for v in labels[i]]
        if cases.kind == "classes":
            known = [outputs[number] if number >= 0 else "" for number in labels[i]]
        keys = (cases.patients[i], cases.exams[i], cases.sides[i])
        values = [repr(float(value)) for value in scores[i]]
        rows.append([name, *keys, *known, *values, *(cases.columns[column][i] for column in further)])
    write_csv(path, [_NAMES[cases.level], *KEYS, *label_columns, *score_columns, *further], rows, "\n")
    return path


def digits(value: float) -> str:
    """A number with all digits; integers without a decimal point."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def read_marks(marks: str | Path, table: str | Path, images: Cases) -> tuple[list[Marked], int]:
    """Marks and lesions of the images, for FROC, and the number of findings that are left out without box or outline.

    Args:
        marks: csv with image_path, score, and row and column, or top, bottom, left and right (whose centre or overlap
            with a lesion counts); in pixels of the stored file, as written by gigamorph explain.
        table: csv whose findings are the lesions.
        images: the evaluated images, with or without marks.

    Raises:
        DataError: for errors in columns, numbers or images.
    """
    found = _read(Path(marks))
    found.require("image_path", "score")
    boxes = {"top", "bottom", "left", "right"} <= set(found.header)
    position = ("top", "bottom", "left", "right") if boxes else ("row", "column")
    found.require(*position)
    of_frames = "frame" in found.header and "frame" in images.columns
    frames = images.columns["frame"] if of_frames else ("",) * len(images)
    wanted = {
        (place_of(name, Path()), frame): number
        for number, (name, frame) in enumerate(zip(images.names, frames, strict=True))
    }
    if len(wanted) < len(images):
        raise DataError(
            f"{images.names[0]}: an image or frame occurs twice; remove one, or add a column frame to predictions and "
            "marks"
        )

    def key(row: Mapping[str, str]) -> ImageKey:
        return place_of(row["image_path"], Path()), frame_of(row) if of_frames else ""

    rows: list[list[list[float]]] = [[] for _ in wanted]
    for place, row in zip(found.places, found.rows, strict=True):
        number = wanted.get(key(row))
        if number is not None:  # else of another split
            rows[number].append([_number(row, name, found, place) for name in (*position, "score")])
    lesions, without, there = _lesions(Path(table), wanted, of_frames)
    if found.rows and not there & {key(row) for row in found.rows}:
        raise DataError(
            f"{marks}: none of its {len(found.rows)} marks belongs to an image of {table} (such as "
            f"{found.rows[0]['image_path']}); paths of marks are relative to the working directory"
        )

    def marked(number: int, cluster: str) -> Marked:
        values = np.array(rows[number], np.float64).reshape(-1, len(position) + 1)
        places = (values[:, 0:4:2] + values[:, 1:4:2]) / 2 if boxes else values[:, :2]
        of_image = np.array(lesions[number], np.float64).reshape(-1, 4)
        return Marked(cluster, of_image, places, values[:, -1], values[:, :4] if boxes else None)

    return [marked(number, cluster) for number, cluster in enumerate(images.clusters)], without


def _lesions(
    table: Path, wanted: dict[ImageKey, int], of_frames: bool
) -> tuple[list[list[Sequence[float]]], int, set[ImageKey]]:
    """The boxes of each image, the number of findings without a box, and all images of the table."""
    boxes: list[list[Sequence[float]]] = [[] for _ in wanted]
    without, known = 0, set()
    for record in read_table(table, labels=False, check_files=False).records:
        frame = str(record.frame) if of_frames and record.frame is not None else ""
        key = place_of(str(record.path), Path()), frame
        known.add(key)
        number = wanted.get(key)
        if number is None:
            continue
        for finding in record.findings:
            box = finding.box
            if box is None and finding.outline:
                rows, columns = zip(*finding.outline, strict=True)
                box = box_around(min(rows), max(rows), min(columns), max(columns))
            if box is None:
                without += 1
            else:
                boxes[number].append(box)
    missing = next((one for one in wanted if one not in known), None)
    if missing is not None:
        name, frame = missing
        missed = f"{name}, frame {frame}" if frame else name
        raise DataError(f"{table}: has no row of {missed}; use the table that was predicted")
    return boxes, without, known


_NO_NAMES: Mapping[str, float] = {}
_MERGED = ("breasts.csv", "exams.csv")  # of the images in predictions.csv
_TABLES = ("predictions.csv", "out_of_fold.csv", "val.csv")


def samples_in(path: Path) -> Path:
    """The table of samples: that of `table_in`, or the table of exams for a network that combines views.

    Raises:
        DataError: see `table_in`.
    """
    table = table_in(path)
    exams = table.with_name("exams.csv")
    return exams if path.is_dir() and "views" in note_of(table) and exams.is_file() else table


def note_of(predictions: Path) -> dict[str, Any]:
    """The JSON file of `gigamorph predict` that belongs to its tables; empty for other predictions."""
    table_name = "predictions.csv" if predictions.name in _MERGED else predictions.name
    with contextlib.suppress(OSError, ValueError):
        note = parse_json(predictions.with_name(table_name).with_suffix(".json").read_text())
        return note if isinstance(note, dict) else {}
    return {}


def table_in(path: Path) -> Path:
    """The path of a table of predictions, also in a folder of `gigamorph predict` or of a cross-validation.

    Raises:
        DataError: if the folder has no predictions.
    """
    if not path.is_dir():
        return path
    for name in _TABLES:
        if (path / name).is_file():
            return path / name
    run = path / "best.ckpt"
    hint = f"; create it with gigamorph predict {run} TABLE --out FOLDER" if run.exists() else ""
    raise DataError(f"{path}: holds no predictions.csv{hint}")


def _read(path: Path) -> Rows:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    rows = read_rows(path)
    _add_own_names(rows)
    for key in (key for key in KEYS if key in rows.header):
        for row in rows.rows:
            row[key] = identifier(row[key])
    if "laterality" in rows.header:
        for place, row in zip(rows.places, rows.rows, strict=True):
            sides = [side(one) for one in row["laterality"].split("+")]  # exams may have both
            if row["laterality"] and None in sides:
                raise DataError(f"{path}, {place}: laterality {row['laterality']!r} is neither L nor R; correct it")
            row["laterality"] = "+".join(filter(None, sides))
    return rows


def _add_own_names(rows: Rows) -> None:
    """Add our names of columns that `read_table` accepts under other names (study_id, Patient_ID); both can be used."""
    for name, own in list(zip(rows.header, own_names(rows.header), strict=True)):
        if own != name:
            rows.header.append(own)
            for row in rows.rows:
                row[own] = row[name]


def read_rows_of(path: Path, split: str | None, *, only_with: str) -> tuple[Rows, dict[str, dict[str, int]]] | None:
    """The measured rows and the counts of `TableParts`; None without a column that begins with ``only_with``."""
    rows = _read(path)
    if not any(name.startswith(only_with) for name in rows.header):
        return None
    measured, counts = _choose_split(rows, split)
    _keep_rows(rows, measured)
    return rows, counts


def _keep_rows(rows: Rows, numbers: Sequence[int]) -> None:
    rows.places[:] = [rows.places[n] for n in numbers]
    rows.rows[:] = [rows.rows[n] for n in numbers]


def _choose_split(rows: Rows, split: str | None) -> tuple[list[int], dict[str, dict[str, int]]]:
    """The indices of measured rows, and the counts of `TableParts`.

    Raises:
        DataError: if there are no rows, a patient is in two splits, or one of several splits must be chosen.
    """
    if not rows.rows:
        raise DataError(f"{rows.path}: holds no predictions; pass a table with at least one row")
    if "split" not in rows.header:
        if split not in (None, "all"):
            raise DataError(f"{rows.path}: has no column split; omit --split, or provide the table with --table")
        return list(range(len(rows.rows))), {"measured": {"": len(rows.rows)}, "left_out": {}}
    for row in rows.rows:
        row["split"] = SPLIT_NAMES.get(row["split"].lower(), row["split"])
    there = Counter(row["split"] for row in rows.rows)
    if "patient_id" in rows.header:
        check_leaks(
            [
                Record(Path(row.get("image_path", "")), -1, row["patient_id"], split=row["split"])
                for row in rows.rows
                if row["split"] in SPLITS and row["patient_id"]
            ]
        )
    if split is None and len(there) > 1:
        names = ", ".join(sorted(name or "none" for name in there))
        raise DataError(f"{rows.path}: holds images of several splits ({names}); choose one, such as --split test")
    wanted = set(there) - {"train"} if split in (None, "all") else set(split.split(","))
    found = [n for n, row in enumerate(rows.rows) if row["split"] in wanted]
    if not found and split in (None, "all"):
        reason = "all rows are of split train, on which the network was trained; to measure them anyway, use"
        raise DataError(f"{rows.path}: {reason} --split train")
    if not found:
        raise DataError(f"{rows.path}: holds no rows of split {split}; choose another split")
    order = sorted(there, key=lambda name: (*SPLITS, name).index(name))
    return found, {
        "measured": {name: there[name] for name in order if name in wanted},
        "left_out": {name: there[name] for name in order if name not in wanted},
    }


@dataclass(frozen=True)
class _Scored:
    """The columns of scores.

    Attributes:
        names: of the outputs.
        values: (rows, outputs), log-odds if `probable`.
        probable: whether values are log-odds.
        labels: for a single requested column, the names of classes with columns of its kind: 1 for its own class.
    """

    names: list[str]
    values: Array
    probable: bool
    labels: Mapping[str, float] = field(default_factory=dict)


def _scores(rows: Rows, score: str | None, label: str | None) -> _Scored:
    if score is not None:
        rows.require(score)
        prefix = next((one for one in (ODDS, PROBABILITY) if score.startswith(one)), "")
        values = _table(rows, [score])
        name = (label or (score if prefix else "label")).removeprefix(prefix if label is None else LABEL)
        labels = {
            one.removeprefix(prefix): float(one == score) for one in rows.header if prefix and one.startswith(prefix)
        }
        if prefix == ODDS:
            return _Scored([name], values, True, labels)
        probable = bool(((values >= 0) & (values <= 1)).all())
        return _Scored([name], odds.of_probabilities(values) if probable else values, probable, labels)
    for prefix in (VALUE, ODDS, PROBABILITY, SCORE):
        columns = [name for name in rows.header if name.startswith(prefix)]
        if columns:
            values = _table(rows, columns)
            if prefix == PROBABILITY:
                if not ((values >= 0) & (values <= 1)).all():
                    raise DataError(f"{rows.path}: columns p_... must be probabilities between 0 and 1")
                values = odds.of_probabilities(values)
            return _Scored([name.removeprefix(prefix) for name in columns], values, prefix not in (SCORE, VALUE))
    there = ", ".join(rows.header)
    raise DataError(f"{rows.path}: has no column log_odds_NAME, p_NAME or score_NAME, only {there}; use --score")


def _truth(rows: Rows, label: str | None, scored: _Scored) -> dict[str, Any]:
    """Fields of `Cases`: kind, outputs, truth, scores and whether classes are ordered."""
    names, scores = scored.names, scored.values
    several = [LABEL + name for name in names]
    if label is None and len(names) > 1 and set(several) <= set(rows.header):
        return {"kind": "labels", "outputs": tuple(names), "truth": _numbers(rows, several), "scores": scores}
    single = len(names) == 1 and ("label" not in rows.header or any(row.get(several[0]) for row in rows.rows))
    column = label or (several[0] if single else "label")
    rows.require(column)
    if len(names) == 1:
        # A label column of the scored class has 1 or 0 for it, even if the class is named 0.
        own = {LABEL + name for name, is_scored in scored.labels.items() if is_scored}
        by_name = {} if column in own else scored.labels
        return {"kind": "binary", "outputs": (names[0],), "truth": _numbers(rows, [column], by_name), "scores": scores}
    note = note_of(rows.path)
    order, is_ordered = in_order(names, note.get("classes", ()), stated=note.get("ordered") is True)
    numbers = {name: number for number, name in enumerate(order)}
    positive = numbers[_positive(rows, names, order)] if len(names) == 2 else 0
    if len(names) == 2 and not all(name.isdecimal() for name in names):
        numbers = {"0": 1 - positive, "1": positive} | numbers
    found = []
    for place, row in zip(rows.places, rows.rows, strict=True):
        name = row[column] if row[column] in numbers else whole(row[column])
        if name and name not in numbers:
            raise DataError(f"{rows.path}, {place}: {column} {row[column]!r} must be one of {', '.join(order)}")
        found.append(numbers.get(name, -1))
    labels = np.array(found)
    truth = np.where((labels < 0)[:, None], np.nan, np.eye(len(names))[labels])
    scores = scores[:, [names.index(name) for name in order]]
    if len(names) == 2:
        own = [positive]
        return {"kind": "binary", "outputs": (order[positive],), "truth": truth[:, own], "scores": scores[:, own]}
    return {"kind": "classes", "outputs": tuple(order), "truth": truth, "scores": scores, "ordered": is_ordered}


def _positive(rows: Rows, names: Sequence[str], order: Sequence[str]) -> str:
    """The positive one of two classes with columns `names`: by name, else the second of the training's `order`."""
    note = note_of(rows.path)
    found = positive_of(order) or (order[1] if list(order) == note.get("classes") else None)
    if found is None:
        columns = [prefix + name for name in order for prefix in (ODDS, PROBABILITY, SCORE)]
        asked = " or ".join(f"--score {name}" for name in columns if name in rows.header)
        reason = f"the names {' and '.join(order)} do not determine the positive class"
        raise DataError(f"{rows.path}: {reason}; use {asked}")
    if found != names[1] and not found.isdecimal() and "sha256" in note and "classes" not in note:
        raise DataError(f"{rows.path}: an older gigamorph predict wrote its labels as numbers; predict again, --resume")
    return found


def _measured(rows: Rows, label: str | None, names: Sequence[str]) -> Array:
    """The true numbers (rows, outputs), NaN for empty cells."""
    columns = [LABEL + name for name in names]
    if label is not None:
        if len(names) > 1:
            raise DataError(f"{rows.path}: predicts {len(names)} numbers; --label applies only to one")
        columns = [label]
    rows.require(*columns)
    return _table(
        rows, columns, lambda row, column, place: _number(row, column, rows, place) if row[column] else np.nan
    )


def _numbers(rows: Rows, columns: Sequence[str], by_name: Mapping[str, float] = _NO_NAMES) -> Array:
    """Labels 1, 0, or NaN for empty cells; `by_name` maps names of classes."""

    def value(row: dict[str, str], column: str, place: str) -> float:
        if not row[column]:
            return np.nan
        known = by_name.get(row[column], by_name.get(whole(row[column]), number(row[column])))
        if known not in (0, 1):
            raise DataError(
                f"{rows.path}, {place}: {column} {row[column]!r} must be 1, 0 or empty; for named classes, add a "
                "column p_NAME for each"
            )
        return known

    return _table(rows, columns, value)


def _table(
    rows: Rows, columns: Sequence[str], value: Callable[[dict[str, str], str, str], float] | None = None
) -> Array:
    """The values (rows, columns) of cells; by default their numbers."""
    value = value or (lambda row, column, place: _number(row, column, rows, place))
    pairs = zip(rows.places, rows.rows, strict=True)
    return np.array([[value(row, column, place) for column in columns] for place, row in pairs], np.float64)


def _number(row: dict[str, str], column: str, rows: Rows, place: str) -> float:
    value = rows.number(row, column, place)
    if np.isnan(value):
        raise DataError(f"{rows.path}, {place}: {column} is not a number (NaN); correct it")
    return value
