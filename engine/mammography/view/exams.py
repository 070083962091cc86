"""The exams of a table of predictions for the viewer: images in hanging order, exams with the largest errors first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...datasets.dataset import open_record
from ...datasets.masks import Classes, FileMask, Mask, mask_as_seen, masks_of
from ...datasets.tables import READING, Finding, Record, read_table, reading_of
from ...datasets.tables.cells import Rows, read_rows
from ...datasets.tables.generic import to_record
from ...datasets.views import MirroredSource
from ...errors import DataError
from ...evaluate.class_names import positive_of
from ...evaluate.dice import DICE, SHARE, classes_of_masks
from ...evaluate.join import ImageRecords, missing_file_hint
from ...evaluate.read import LABEL, PROBABILITY, VALUE, table_in
from ...images.affine import CoordinateMap
from ...images.pixels import PixelSource, as_stored, stored_source, to_original

_SIDES = {"R": 0, "L": 1}
_VIEWS = {"CC": 0, "MLO": 1}
_LOG_ODDS = "log_odds_"


@dataclass(frozen=True)
class PredictedMask:
    """The predicted mask of an image.

    Attributes:
        classes: meaning of the values in masks.
        dice: of each class except the background, if defined.
        files: of the "predicted" mask and the "reference", if any.
    """

    classes: Classes
    dice: Mapping[str, float]
    files: Mapping[str, Sequence[Path]]


@dataclass(frozen=True)
class ExamImage:
    """One image of an exam.

    Attributes:
        record: of the image.
        predicted: probabilities of classes or labels, or numbers, by name; for masks the fraction of the image's pixels
            of each class except the background.
        truth: known true values by name; for several classes 1 for the true one and 0 for the others.
        numbers: whether numbers are predicted.
        masks: the predicted mask, if any.
        grey: default options of `open_record` for the conversion to grey values.
    """

    record: Record
    predicted: Mapping[str, float]
    truth: Mapping[str, float] = field(default_factory=dict)
    numbers: bool = False
    masks: PredictedMask | None = None
    grey: Mapping[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The largest difference between prediction and truth; None if the truth is unknown.

        For masks it is 1 minus the mean Dice of the classes.
        """
        if self.masks is not None:
            return 1 - float(np.mean(list(self.masks.dice.values()))) if self.masks.dice else None
        differences = [abs(self.predicted[name] - value) for name, value in self.truth.items()]
        return max(differences) if differences else None

    def open(self) -> PixelSource:
        """The image in hanging orientation: the chest wall of a left breast at the left, of a right one at the right.

        Raises:
            DataError: if it cannot be opened.
        """
        if remedy := missing_file_hint(str(self.record.path)):
            raise DataError(f"{self.record.path}: is not next to the predictions; {remedy}")
        source = open_record(self.record, **self.grey)
        return MirroredSource(source, left_right=True, up_down=False) if self.record.laterality == "R" else source

    def mask(self, which: str, source: PixelSource) -> Mask:
        """A mask, aligned with the pixels of `open`'s image.

        Args:
            which: "predicted" or "reference"; one of the keys of ``masks.files``.
            source: the image.

        Raises:
            DataError: if it cannot be read, or has another size than the image.
        """
        assert self.masks is not None
        files = tuple(Finding("", mask=path) for path in self.masks.files[which])
        mask = FileMask(replace(self.record, findings=files), self.masks.classes)
        mask.require_size(source)
        return mask_as_seen(mask, source)

    def millimetres(self, source: PixelSource) -> float:
        """The side of a pixel of `open`'s image in the breast; 0 if the header does not state it."""
        stored = stored_source(source)
        info = None if stored is None else getattr(stored.stored, "info", None)
        return info.spacing[1] / (info.magnification or 1) if info and info.spacing else 0.0

    def boxes(self, source: PixelSource) -> list[tuple[float, float, float, float, str]]:
        """The findings' boxes (left, top, right, bottom, description) in pixels of `open`'s image."""
        place = stored_place(source).inverse()
        found = []
        for finding in self.record.findings:
            box = finding.box
            if box is None and finding.outline:
                rows, columns = zip(*finding.outline, strict=True)
                box = min(rows), max(rows), min(columns), max(columns)
            if box is not None:
                top, bottom, left, right = box
                corners = place.points(np.array([[left, top], [right, bottom]], np.float64))
                (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
                found.append((x0, y0, x1, y1, " ".join(filter(None, (finding.kind, finding.pathology)))))
        return found


def stored_place(source: PixelSource) -> CoordinateMap:
    """The transform from coordinates of an image to those of the stored file."""
    return to_original(as_stored(source)).inverse() @ to_original(source)


@dataclass(frozen=True)
class Exam:
    """The images of an exam, in rows of views and columns of sides."""

    views: tuple[ExamImage, ...]
    name: str = ""

    @property
    def error(self) -> float | None:
        """The largest error of the images."""
        known = [view.error for view in self.views if view.error is not None]
        return max(known) if known else None


def read_exams(
    source: str | Path,
    *,
    table: str | Path | None = None,
    split: str | None = None,
    grey: Mapping[str, Any] | None = None,
) -> list[Exam]:
    """The exams of a predictions.csv, or of the folder that contains it, by decreasing error.

    Args:
        source: of gigamorph predict, or the folder of a cross-validation (out_of_fold.csv).
        table: csv that was predicted, with findings and missing labels, and the images of predicted exams.
        split: only show images of this split.
        grey: see `ExamImage.grey`.

    Raises:
        DataError: if there are no predictions, or a table is invalid.
    """
    path = table_in(Path(source))
    rows = read_rows(path)
    records = () if table is None else read_table(table, labels=False, check_files=False).records
    if "exam" in rows.header and "image_path" not in rows.header:
        _expand(rows, table, records)
    rows.require("image_path")
    known = ImageRecords(records, table or "")
    there = {record.path.absolute() for record in records}
    classes = classes_of_masks(rows)
    exams: dict[tuple[str, ...], list[ExamImage]] = {}
    for place, row in zip(rows.places, rows.rows, strict=True):
        if split is not None and row.get("split") != split:
            continue
        view = replace(_view(rows, place, row, known, classes), grey=grey or {})
        own = view.record
        # Each image of an unknown patient is an exam.
        alone = row["image_path"], "" if own.frame is None else f"frame {own.frame}"
        key = (own.patient_id, own.exam_id or "") if own.patient_known else ("", *alone)
        exams.setdefault(key, []).append(view)
    if not exams:
        raise DataError(f"{path}: holds no predictions{f' of split {split}' if split else ''}")
    if there and not any(view.record.path.absolute() in there for views in exams.values() for view in views):
        remedy = missing_file_hint(rows.rows[0]["image_path"]) or "use the table that was predicted"
        raise DataError(f"{table}: names none of the images of {path}; {remedy}")
    found = [Exam(tuple(sorted(views, key=_place)), " ".join(filter(None, key))) for key, views in exams.items()]
    return sorted(found, key=lambda exam: -1.0 if exam.error is None else exam.error, reverse=True)


def _expand(rows: Rows, table: str | Path | None, records: Sequence[Record]) -> None:
    """Replace rows of exams by rows of their images in the table, with the exam's predictions."""
    if table is None:
        raise DataError(f"{rows.path}: holds exams without their images; provide their table with --table")
    rows.require("patient_id", "exam_id")
    images: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        images.setdefault((record.patient_id, record.exam_id or ""), []).append(record)
    found = [
        (place, {**row, **_cells(one)})
        for place, row in zip(rows.places, rows.rows, strict=True)
        for one in images.get((row["patient_id"], row["exam_id"]), ())
    ]
    if not found:
        raise DataError(f"{table}: names none of the exams of {rows.path}; use their table")
    rows.header.append("image_path")
    rows.places[:], rows.rows[:] = map(list, zip(*found, strict=True))


def _cells(record: Record) -> dict[str, str]:
    """The columns of an image in a row of its exam."""
    own = {"image_path": str(record.path), "laterality": record.laterality or "", "view": record.view or ""}
    return {**own, **reading_of(record)}


def _place(view: ExamImage) -> tuple[int, str, int]:
    own = view.record
    return _VIEWS.get(own.view or "", 2), own.view or "", _SIDES.get(own.laterality or "", 2)


def _view(rows: Rows, place: str, row: Mapping[str, str], known: ImageRecords, classes: Classes | None) -> ExamImage:
    path = Path(row["image_path"])
    if not path.is_absolute() and not path.exists() and (rows.path.parent / path).exists():
        path = rows.path.parent / path
    try:
        own = known.find(path, row)
    except DataError as error:
        raise DataError(f"{rows.path}, {place}: {error}") from error
    read = to_record(rows.path, place, {name: row.get(name, "") for name in ("image_path", *READING)}, -1)
    patient = row.get("patient_id", "")
    record = Record(
        path,
        -1,
        patient or str(path),
        split=row.get("split") or None,
        laterality=row.get("laterality") or (own.laterality if own else None),
        view=row.get("view") or (own.view if own else None),
        exam_id=row.get("exam_id") or None,
        findings=own.findings if own else (),
        frame=own.frame if own and read.frame is None else read.frame,
        white=own.white if own and read.white is None else read.white,
        chest_wall=read.chest_wall or (own.chest_wall if own else None),
        labels=own.labels if own else {},
        patient_known=bool(patient) and Path(patient).name != path.name,
    )
    if classes is not None:
        return _masked(rows, place, row, record, classes, () if own is None else masks_of(own))
    # Tables of a cross-validation have only log-odds.
    found = (prefix for prefix in (VALUE, PROBABILITY, _LOG_ODDS) if any(n.startswith(prefix) for n in rows.header))
    prefix = next(found, None)
    if prefix is None:
        raise DataError(f"{rows.path}: has no column p_NAME, value_NAME or log_odds_NAME")
    columns = [name for name in rows.header if name.startswith(prefix)]
    predicted = {name.removeprefix(prefix): rows.number(row, name, place) for name in columns}
    if prefix == _LOG_ODDS:
        predicted = {name: 0.5 * (1 + math.tanh(value / 2)) for name, value in predicted.items()}
    return ExamImage(record, predicted, _truth(rows, place, row, record, list(predicted)), prefix == VALUE)


def _masked(
    rows: Rows, place: str, row: Mapping[str, str], record: Record, classes: Classes, reference: Sequence[Path]
) -> ExamImage:
    """The view of a row in a table of masks."""
    shares = {name: rows.number(row, SHARE + name, place) for name in classes.names[1:] if SHARE + name in row}
    dice = {name: rows.number(row, DICE + name, place) for name in classes.names[1:] if row.get(DICE + name)}
    predicted = [rows.path.parent / row["mask"]] if row.get("mask") else []
    for path in (*predicted, *reference):
        if not path.is_file():
            raise DataError(f"{path}: no such mask")
    files = {"predicted": predicted, "reference": reference}
    known = PredictedMask(classes, dice, {which: paths for which, paths in files.items() if paths})
    return ExamImage(record, shares, masks=known)


def _truth(rows: Rows, place: str, row: Mapping[str, str], record: Record, names: Sequence[str]) -> dict[str, float]:
    """The true values in the predictions' columns, or else in the table."""
    found = {}
    for name in names:
        cell = row.get(LABEL + name, "")
        if cell and cell.lower() != "nan":
            found[name] = rows.number(row, LABEL + name, place)
        elif name in record.labels:
            found[name] = record.labels[name]
    label = row.get("label", "")
    if found or not label:
        return found
    true = label if label in names else None
    if true is None and label in ("0", "1") and len(names) == 2 and (positive := positive_of(names)):
        # Tables of other programs, in any order of columns.
        true = next(name for name in names if (name == positive) == (label == "1"))
    return {} if true is None else {name: float(name == true) for name in names}
