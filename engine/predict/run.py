"""Predicts an archive: results and heat maps of images, and the tables of images, breasts and exams."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datasets.tables import Record
from ..evaluate.recalibration import Calibration
from ..models.outputs import outputs_of
from .delivery import Document
from .index import RunDatabase
from .job import PredictJob, Result, Unit
from .options import RunOptions, Scores, Summary, Watch
from .predictor import RESULTS, Classifier, Opener, PredictionUnit, Wanted
from .rows import Row
from .runner import run
from .tables import prediction_of, write_odd, write_tables

__all__ = ["PredictOptions", "Summary", "Watch", "predict"]


@dataclass(frozen=True)
class PredictOptions(RunOptions):
    """Options of a run of predictions; see also `RunOptions`.

    Attributes:
        heatmaps: draw ``heatmaps/NAME.png``, like `gigamorph explain`.
        identifiers: write patient names that only DICOM headers have; otherwise they are numbered.
        calibration: of two classes, for tables and heat maps.
    """

    heatmaps: bool = False
    identifiers: bool = False
    calibration: Calibration | None = None


def predict(
    opener: Opener,
    sources: Sequence[str | Path | Record],
    out: str | Path,
    options: PredictOptions,
    watch: Watch | None = None,
) -> Summary:
    """Predict images into the folder ``out``; see `PredictOptions` and `gigamorph.engine.predict.runner.run`.

    ``predictions.csv``, ``breasts.csv`` (mean of the views of each breast), ``exams.csv`` and ``quarantine.csv`` are
    written at the end.

    Args:
        opener: opens the network; must be picklable if there are several devices.
        sources: tables, folders, images, or records.
        out: folder of the results.
        options: of the run.
        watch: callbacks.

    Raises:
        DataError: naming a damaged image, or for an invalid table.
        GigamorphError: if ``out`` has other results or is in use by another process, cannot be written, or too many
            images failed.
    """
    return run(_Predict(opener, options), sources, out, options, watch)


class _Predict(PredictJob):
    schema = RESULTS

    _options: PredictOptions
    _network: Classifier
    _wanted: Wanted

    def __init__(self, opener: Opener, options: PredictOptions) -> None:
        super().__init__(opener, options)
        self.named = "heatmap" if options.heatmaps else ""

    def described(self) -> dict[str, Any]:
        options = self._options
        drawn = repr(options.calibration) if options.heatmaps and options.calibration is not None else ""
        return {
            "heatmaps": options.heatmaps,
            "identifiers": options.identifiers,
            "flip": list(options.flips),
            "white": options.white,
            "precision": options.precision,
            "drawn": hashlib.sha256(drawn.encode()).hexdigest() if drawn else "",
        }

    def differs(self, name: str, before: Any) -> str:
        if name == "drawn":
            return "its heat maps have another calibration; continue with it, or name another --out"
        return super().differs(name, before)

    def open(self, options: RunOptions) -> None:
        super().open(options)
        outputs = outputs_of(self._network.net)
        exclusive = outputs is None or outputs.exclusive  # labels and numbers have separate columns
        self.classes = self._network.classes if exclusive else None

    def begin(self, out: Path, secret: Callable[[], bytes]) -> None:
        options = self._options
        by = None if options.identifiers else secret()
        self._wanted = Wanted(options.model, out, options.heatmaps, options.calibration, by)

    def compute(self) -> Callable[[Any], Unit]:
        return functools.partial(PredictionUnit, wanted=self._wanted)

    def documents(self, index: RunDatabase, results: Iterable[Result], out: Path) -> Iterator[Document]:
        """A structured report for each study."""
        from .dicom_report import ImageValues, report, study_of  # its code tables take half a second

        options, classes, outputs = self._options, self._network.classes, outputs_of(self._network.net)
        numbers = outputs is not None and outputs.numbers

        def image_values(row: Row, result: Result) -> ImageValues:
            found = prediction_of(row, result, index, options.calibration, identifiers=True)
            values = found.log_odds if numbers else found.probabilities
            return ImageValues(result["key"], row, dict(zip(classes, map(float, values), strict=True)), numbers)

        index.clear_items()
        for row, result in index.joined(results):
            index.store_items([("", study_of(row), "", "", image_values(row, result))])
        for group in index.groups("exam"):
            images = list({one.key: one for one in group}.values())  # an image of several rows once
            content = repr([(one.key, one.values) for one in images])
            make = functools.partial(report, images, checkpoint=options.checkpoint, model=options.model)
            yield Document(content, images[0].row.name, make)

    def tables(self, index: RunDatabase, results: Iterable[Result], out: Path) -> Scores:
        options, outputs = self._options, outputs_of(self._network.net)
        scores = write_tables(
            index,
            write_odd(results, out),
            out,
            self._network.classes,
            options.calibration,
            identifiers=options.identifiers,
            outputs=outputs,
        )
        note: dict[str, Any] = {} if self.classes is None else {"classes": list(self.classes)}
        if outputs is not None and outputs.ordered:
            note["ordered"] = True
        if options.calibration is not None:
            split = options.calibration.split or "not known"
            note["calibrated_on"] = f"{options.calibration.images} images, split {split}"
        if outputs is not None and outputs.views is not None:
            note["views"] = outputs.views
        self.write_note(out, **note)
        return scores
