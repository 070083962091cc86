"""Prediction over an archive: results of every image, heat maps, and the tables of images, breasts and exams."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datasets.tables import Record
from ..evaluate.recalibration import Calibration
from ..files import write_atomically
from ..models.outputs import outputs_of
from .index import Index
from .job import Job, Result, Start, Unit
from .options import RunOptions, Scores, Summary, Watch
from .predictor import RESULTS, Classifier, Opener, Predicting, Wanted, start_predicting
from .runner import run
from .tables import write_tables

__all__ = ["Options", "Summary", "Watch", "predict"]


@dataclass(frozen=True)
class Options(RunOptions):
    """How a run of predictions goes; see also `RunOptions`.

    Attributes:
        heatmaps: draw ``heatmaps/NAME.png``, as `gigamorph explain` does.
        identifiers: name patients that only the DICOM headers name; they are numbered otherwise.
        calibration: of two classes, for tables and heat maps.
    """

    heatmaps: bool = False
    identifiers: bool = False
    calibration: Calibration | None = None


def predict(
    opener: Opener,
    sources: Sequence[str | Path | Record],
    out: str | Path,
    options: Options,
    watch: Watch | None = None,
) -> Summary:
    """Predict images into the folder ``out``; see `Options` and `gigamorph.engine.predict.runner.run`.

    ``predictions.csv``, ``breasts.csv`` (mean of the views of each breast), ``exams.csv`` and ``quarantine.csv`` are
    written at the end.

    Args:
        opener: opens the network; to be pickled where there are several devices.
        sources: tables, folders, images, or records.

    Raises:
        DataError: a damaged image, named; a table that is wrong.
        GigamorphError: if ``out`` holds other results or is held by another process, cannot be written, or too many
            images failed.
    """
    return run(_Predict(opener, options), sources, out, options, watch)


class _Predict(Job):
    kind, made, product, schema = "predict", "predictions", "predictions.csv", RESULTS

    _classifier: Classifier
    _wanted: Wanted

    def __init__(self, opener: Opener, options: Options) -> None:
        self._opener, self._options = opener, options
        self.named = "heatmap" if options.heatmaps else ""

    def described(self) -> dict[str, Any]:
        options = self._options
        drawn = repr(options.calibration) if options.heatmaps and options.calibration is not None else ""
        return {
            "heatmaps": options.heatmaps,
            "identifiers": options.identifiers,
            "drawn": hashlib.sha256(drawn.encode()).hexdigest() if drawn else "",
        }

    def differs(self, name: str, before: Any) -> str:
        if name == "drawn":
            return "its heat maps have another calibration; go on with that, or name another --out"
        return super().differs(name, before)

    def open(self, options: RunOptions) -> None:
        # Where other processes compute, this one only needs to know the classes, and how images are opened.
        self._classifier = self._opener(device=options.device if options.here else "cpu")
        self.classes = self._classifier.classes

    def look(self, index: Index, watch: Watch) -> None:
        classifier = self._classifier
        if index.rows == classifier.trained_on:
            index.resolve(lambda records: classifier.open_images(records).records)
        watch.looked(classifier, [row.record for row in index.sample(4) if not row.url])

    def begin(self, out: Path, secret: Callable[[], bytes]) -> None:
        options = self._options
        by = None if options.identifiers else secret()
        self._wanted = Wanted(options.model, out, options.heatmaps, options.calibration, by)

    def unit(self) -> Unit:
        return Predicting(self._classifier, self._wanted)

    def start(self) -> Start:
        return functools.partial(start_predicting, self._opener, self._wanted)

    def tables(self, index: Index, results: Iterable[Result], out: Path) -> Scores:
        options, outputs = self._options, outputs_of(self._classifier.net)
        scores = write_tables(
            index,
            results,
            out,
            self._classifier.classes,
            options.calibration,
            identifiers=options.identifiers,
            outputs=outputs,
        )
        model: dict[str, str] = {"checkpoint": options.checkpoint, "sha256": options.model}
        if options.calibration is not None:
            split = options.calibration.split or "not known"
            model["calibrated_on"] = f"{options.calibration.images} images, split {split}"
        write_atomically(out / "predictions.json", lambda p: p.write_text(json.dumps(model) + "\n"), "note")
        return scores
