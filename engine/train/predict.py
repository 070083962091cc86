"""Predictions that stream to disk: one line per image, written as soon as it is known."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from io import FileIO, StringIO
from pathlib import Path
from typing import Any

import torch

from ..accelerate import Accelerated
from ..datasets.tables.cells import escape
from ..errors import BudgetError, DataError, GigamorphError
from ..evaluate.read import ODDS, PROBABILITY
from ..evaluate.recalibration import Calibration
from ..images.pixels import as_stored
from ..models.outputs import outputs_of
from .checkpoint import write_atomically
from .classify import Images, prediction
from .explanation import caption, explain_class
from .heatmap import overlay_name, write_overlay
from .metrics import Prediction, per_breast, per_exam
from .progress import Meter


def predict(
    net: Accelerated,
    images: Images,
    out: str | Path,
    classes: Sequence[str],
    *,
    heatmaps: bool = False,
    skip_bad: bool = False,
    identifiers: bool = False,
    calibration: Calibration | None = None,
    meter: Meter | None = None,
) -> tuple[list[Prediction], list[str]]:
    """Predict image by image into ``out``.

    ``predictions.csv`` gets one flushed line per image, so that whatever ends the run early leaves what was computed;
    ``breasts.csv`` (mean of the views of each breast) and ``exams.csv`` (highest of the breasts of each exam) are
    written at the end, also after an error. With ``heatmaps``,
    ``heatmaps/NAME.png`` is what `gigamorph explain` draws: what stands out for the second of two classes, else for
    the most probable one, with its probability, on every pixel of the image as its file stores it (``.tif`` for very
    large images), so that it lies over the original and over boxes in the file's coordinates.

    Args:
        net: an accelerated network, pixel source -> (1, classes).
        images: opened one by one; `DataError` if a file cannot be read.
        classes: names of the outputs.
        skip_bad: note a damaged image and go on; otherwise it ends the run.
        identifiers: name patients that only the DICOM headers name by their PatientID; they are numbered otherwise.
        calibration: of two classes; what is written is calibrated, and a column ``called`` says 1 where the threshold
            is reached.

    Returns:
        The predictions, and for each skipped image the message.

    Raises:
        DataError: a damaged image, named.
        GigamorphError: if ``out`` already holds predictions, or cannot be written.
    """
    out = Path(out)
    meter = meter or Meter(None)
    net.eval()
    found: list[Prediction] = []
    skipped: list[str] = []
    meter.start("predict", len(images))

    def breasts() -> None:
        if found:
            write_atomically(out / "breasts.csv", lambda p: _write_all(p, per_breast(found), classes), "table")
            write_atomically(out / "exams.csv", lambda p: _write_all(p, per_exam(found), classes, "exam"), "table")

    one = _Predictor(net, out, classes, heatmaps, identifiers, calibration)
    with _Table(out / "predictions.csv", classes, calibration) as table:
        try:
            for index in range(len(images)):
                try:
                    item = images[index]
                    meter.image(item["image"].shape[-2] * item["image"].shape[-1])
                    result = one(item)
                except BudgetError as error:  # the larger images of a set may not fit
                    raise BudgetError(f"{images.records[index].path}: {error}") from error
                except DataError as error:
                    if not skip_bad:
                        raise
                    skipped.append(str(error))
                    meter.note(f"skipped: {error}")
                else:
                    table.write(result)
                    found.append(result)
                meter.image_done()
        except BaseException:
            # The first error is the one to show: on a full disk this would fail as well.
            with contextlib.suppress(GigamorphError):
                breasts()
            raise
        breasts()
    return found, skipped


class _Predictor:
    """An item of a data set -> its prediction; draws its heat map if that is wanted."""

    def __init__(
        self,
        net: Accelerated,
        out: Path,
        classes: Sequence[str],
        heatmaps: bool,
        identifiers: bool,
        calibration: Calibration | None,
    ) -> None:
        self._net, self._out, self._classes, self._calibration = net, out, classes, calibration
        self._heatmaps, self._identifiers = heatmaps, identifiers
        self._names: set[str] = set()
        self._patients: dict[str, str] = {}

    def __call__(self, item: dict[str, Any]) -> Prediction:
        source = item["image"]
        if self._heatmaps:
            explained, logits, which = explain_class(self._net, source)
        else:
            with torch.no_grad():
                explained, logits, which = None, self._net(source)[0], 0
        result = prediction(item, logits, outputs_of(self._net))
        if self._calibration is not None:
            log_odds = self._calibration(result.log_odds[1])
            result = replace(result, log_odds=(-log_odds, log_odds))
            if explained is not None:
                explained = replace(explained, values=explained.values * self._calibration.slope, log_odds=log_odds)
        if not self._identifiers and result.patient != item["record"].patient_id:
            number = self._patients.setdefault(result.patient, f"P{len(self._patients) + 1:05d}")
            result = replace(result, patient=number)
        if explained is not None:
            name = overlay_name(unique_name(Path(result.image).stem, self._names), as_stored(source).shape)
            text = caption(self._classes[which], result.log_odds[which])
            write_overlay(explained, self._out / "heatmaps" / name, stored=True, caption=text)
        return result


def unique_name(stem: str, taken: set[str]) -> str:
    """``stem``, or ``stem-2`` and so on: files of several folders may share a name."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


class _Table:
    """A csv file of predictions: a line is in the file, whole, when `write` returns, or not at all when it raises."""

    def __init__(self, path: Path, classes: Sequence[str], calibration: Calibration | None) -> None:
        self._path, self._classes, self._calibration = path, classes, calibration
        self._file: FileIO | None = None

    def __enter__(self) -> _Table:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self._path, "x")
        except FileExistsError as error:
            raise GigamorphError(f"{self._path}: already exists; name another --out") from error
        except OSError as error:
            raise GigamorphError(f"{self._path}: cannot be written: {os.strerror(error.errno or 0)}") from error
        self._line([*_header(self._classes), *([] if self._calibration is None else ["called"])])
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, result: Prediction) -> None:
        called = []
        if self._calibration is not None:
            called = [int(result.log_odds[1] >= self._calibration(self._calibration.threshold))]
        self._line([*_row(result), *called])

    def _line(self, values: Iterable[object]) -> None:
        assert self._file is not None
        text = StringIO(newline="")
        csv.writer(text).writerow(map(escape, values))
        rest = text.getvalue().encode()
        before = self._file.tell()
        try:
            while rest:  # an unbuffered write may stop in its midst and say why only when asked for the rest
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            reason = os.strerror(error.errno or 0)
            raise GigamorphError(f"{self._path}: cannot be written: {reason}; free some space") from error


def _header(classes: Sequence[str]) -> list[str]:
    keys = ["image_path", "patient_id", "exam_id", "laterality", "view", "split", "label"]
    return [*keys, *(PROBABILITY + name for name in classes), *(ODDS + name for name in classes)]


def _row(result: Prediction) -> list[object]:
    label = "" if result.label is None else result.label
    # Probabilities are for reading; log-odds, with all digits, keep the order of images that the network is sure of.
    values = (*(f"{value:.6g}" for value in result.probabilities), *(repr(value) for value in result.log_odds))
    keys = (result.image, result.patient, result.exam, result.laterality, result.view, result.split)
    return [*keys, label, *values]


def _write_all(path: Path, results: Sequence[Prediction], classes: Sequence[str], what: str = "breast") -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([what, *_header(classes)[1:]])
        writer.writerows(map(escape, _row(result)) for result in results)
