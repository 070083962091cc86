"""Writes the tables of images, breasts, exams and failures from the parts, and computes the measures."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..datasets.tables import reading_of
from ..datasets.tables.cells import write_csv
from ..evaluate.read import LABEL, ODDS, PROBABILITY, VALUE, digits
from ..evaluate.recalibration import Calibration
from ..models.outputs import Outputs
from ..train.classify import truth_of
from ..train.metrics import Prediction, per_breast, per_exam, scores
from .index import Level, RunDatabase
from .rows import Row

MEASURED = 200_000
"""Maximum number of labelled images that are measured here; use `gigamorph eval` on the table for more."""
LEADING = ("image_path", "patient_id", "exam_id", "laterality", "view", "split")
"""Names of the `leading_cells` of a row."""
_BATCH = 4096
log = logging.getLogger("gigamorph")


def write_tables(
    index: RunDatabase,
    results: Iterable[dict[str, Any]],
    out: Path,
    classes: Sequence[str],
    calibration: Calibration | None,
    *,
    identifiers: bool,
    outputs: Outputs | None = None,
) -> dict[str, dict[str, float | int | None]]:
    """Write the tables of all rows that have a result.

    predictions.csv has the columns that are needed to read the same pixels again (`RunDatabase.reading`).

    Args:
        index: of the run; also stores intermediate data that may not fit into memory.
        results: of the images.
        out: folder of the tables.
        classes: names of the outputs.
        calibration: of two classes.
        identifiers: whether header_patient is written as a name; otherwise it is numbered.
        outputs: the meaning of the network's outputs, see `outputs_of`. Numbers are in columns value_NAME instead of
            probabilities; the truth of numbers and labels is in columns label_NAME. Networks that were trained on
            combined views combine those of breasts and exams in the same way.

    Returns:
        The measures (`scores`) of the labelled images of each split; empty if there are more than `MEASURED`.
    """
    labelled: list[Prediction] = []
    exams: list[Prediction] = []
    header = _header(classes, outputs)
    called = [] if calibration is None else ["called"]
    images = _collecting(_images(index, results, calibration, identifiers, outputs), labelled)
    calls = [] if calibration is None else [calibration.calls]
    rows = ([*_row(one, classes, index.reading), *(int(call(one.log_odds)) for call in calls)] for one in images)
    write_csv(out / "predictions.csv", [header[0], *index.reading, *header[1:], *called], rows)
    levels: tuple[Level, ...] = ("breast", "exam")
    for level in levels:
        found = _grouped(index, level, classes, outputs, calibration)
        if level == "exam" and outputs is not None and outputs.views is not None:
            found = _collecting(found, exams)
        write_csv(out / f"{level}s.csv", [level, *header[1:]], (_row(one, classes) for one in found))
    if len(labelled) > MEASURED:
        return {}

    def measured(split: str) -> dict[str, float | int | None]:
        own = [one for one in exams if one.split == split]
        images = [one for one in labelled if one.split == split]
        return scores(images, classes) | (scores(own, classes) if own else {})

    return {split: measured(split) for split in ("test", "val", "train", "")}


def _images(
    index: RunDatabase,
    results: Iterable[dict[str, Any]],
    calibration: Calibration | None,
    identifiers: bool,
    outputs: Outputs | None,
) -> Iterator[Prediction]:
    """The prediction of each image, which is also stored in the index for `_grouped`."""
    joined = index.joined(results)
    while some := list(itertools.islice(joined, _BATCH)):
        found = [prediction_of(row, result, index, calibration, identifiers) for row, result in some]
        if outputs is not None and not outputs.exclusive:
            true = [truth_of(row.record, outputs.names) for row, _ in some]
            found = [replace(one, numbers=outputs.numbers, truth=known) for one, known in zip(found, true, strict=True)]
        index.store_items((one.image, one.patient, one.exam, one.laterality, one) for one in found)
        yield from found


def _grouped(
    index: RunDatabase, level: Level, classes: Sequence[str], outputs: Outputs | None, calibration: Calibration | None
) -> Iterator[Prediction]:
    groups = index.groups(level)
    if outputs is not None and outputs.views is not None:
        yield from (combined(outputs, classes, calibration, level, group) for group in groups)
        return
    merged = per_breast if level == "breast" else per_exam
    batch: list[Prediction] = []
    for group in groups:
        batch += group
        if len(batch) >= _BATCH:
            yield from merged(batch, classes)
            batch = []
    yield from merged(batch, classes)


def combined(
    outputs: Outputs, classes: Sequence[str], calibration: Calibration | None, level: Level, views: Sequence[Prediction]
) -> Prediction:
    """The prediction of a breast or exam, combined from the network's outputs for its views as in the training.

    Args:
        outputs: of the network, with `views`.
        classes: names of the outputs.
        calibration: of two classes.
        level: "breast" or "exam".
        views: predictions of the views of one breast or exam, each with its row.
    """
    [found] = (per_breast if level == "breast" else per_exam)(views, classes)
    rows = torch.tensor([view.row for view in views], dtype=torch.float64)
    log_odds = outputs.log_odds(outputs.together(rows))[0].tolist()
    if calibration is not None:
        log_odds = calibration.both(log_odds)
    return replace(found, log_odds=tuple(log_odds), level=level)


def _collecting(found: Iterable[Prediction], labelled: list[Prediction]) -> Iterator[Prediction]:
    """Pass predictions through, and add labelled ones to a list, up to the limit `MEASURED`."""
    for one in found:
        if one.known and len(labelled) <= MEASURED:
            labelled.append(one)
        yield one


def write_odd(results: Iterable[dict[str, Any]], out: Path) -> Iterator[dict[str, Any]]:
    """The results again; afterwards, odd.csv lists the images with odd grey values, and one line warns of them."""
    found = list[tuple[str, str]]()
    for result in results:
        if result.get("odd"):
            found.append((result["image_path"], result["odd"]))
        yield result
    if not found:
        (out / "odd.csv").unlink(missing_ok=True)
        return
    write_csv(out / "odd.csv", ["image_path", "reason"], found)
    log.warning("odd grey values in %d image(s), listed in odd.csv; first %s: %s", len(found), *found[0])


def write_failures(index: RunDatabase, out: Path) -> None:
    """Write quarantine.csv, if there are failures or the file exists."""
    path = out / "quarantine.csv"
    if index.counts()[2] or path.exists():
        write_csv(path, ["image_path", "reason"], index.failures())


def prediction_of(
    row: Row, result: dict[str, Any], index: RunDatabase, calibration: Calibration | None, identifiers: bool
) -> Prediction:
    """The prediction of an image, from its row of the table and its result.

    Args:
        row: of the table.
        result: has log_odds, exclusive, header_patient, header_exam, laterality and view, see `RESULTS`.
        index: numbers the patients and exams that only headers name.
        calibration: of two classes.
        identifiers: see `write_tables`.
    """
    own = row.record
    found = Prediction(
        image=row.name,
        log_odds=tuple(result["log_odds"]),
        label=None if own.label < 0 else own.label,
        patient=patient_of(row, result, index, identifiers),
        laterality=own.laterality or result["laterality"],
        view=own.view or result["view"],
        exam=exam_of(row, result, index, identifiers),
        split=own.split or "",
        exclusive=result["exclusive"],
        row=tuple(result.get("row") or ()),
        reading=reading_of(own),
    )
    if calibration is None:
        return found
    return replace(found, log_odds=calibration.both(found.log_odds))


def patient_of(row: Row, result: dict[str, Any], index: RunDatabase, identifiers: bool) -> str:
    """The patient in the table, or else in the header (`header_patient`), see `prediction_of`."""
    patient = row.record.patient_id
    if _names_patient(row) or not result["header_patient"]:
        return patient
    patient = result["header_patient"]
    return patient if identifiers else index.numbered("P", patient)


def exam_of(row: Row, result: dict[str, Any], index: RunDatabase, identifiers: bool) -> str:
    """The exam in the table; if the table has neither exam nor patient, the study of the header (`header_exam`)."""
    exam = result.get("header_exam")
    if row.record.exam_id or not exam or _names_patient(row):
        return row.record.exam_id or ""
    return exam if identifiers else index.numbered("E", exam)


def _names_patient(row: Row) -> bool:
    return Path(row.record.patient_id).name != row.record.path.name


def _header(classes: Sequence[str], outputs: Outputs | None) -> list[str]:
    keys = [*LEADING, "label"]
    if outputs is not None and not outputs.exclusive:
        keys += [LABEL + name for name in classes]
    if outputs is not None and outputs.numbers:
        return [*keys, *(VALUE + name for name in classes)]
    return [*keys, *(PROBABILITY + name for name in classes), *(ODDS + name for name in classes)]


def leading_cells(found: Prediction, reading: Sequence[str] = ()) -> list[object]:
    """The cells of a row up to the split; `reading` names the columns on how the image is read."""
    how = (found.reading.get(name, "") for name in reading)
    return [found.image, *how, found.patient, found.exam, found.laterality, found.view, found.split]


def _row(found: Prediction, classes: Sequence[str], reading: Sequence[str] = ()) -> list[object]:
    """A row of a table; columns are identified by class names, not by order."""
    keys = [*leading_cells(found, reading), "" if found.label is None else classes[found.label]]
    if not found.exclusive:
        truth = found.truth or [math.nan] * len(found.log_odds)
        keys += ["" if math.isnan(value) else digits(value) for value in truth]
    if found.numbers:
        return [*keys, *(repr(value) for value in found.log_odds)]
    # Log-odds have all digits, because probabilities near 0 or 1 lose the order of images.
    values = (*(f"{value:.6g}" for value in found.probabilities), *(repr(value) for value in found.log_odds))
    return [*keys, *values]
