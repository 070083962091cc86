"""Explanations of many images, as files beside a table of marks; on the runner of `gigamorph.engine.predict`."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..datasets.tables import Record
from ..errors import DataError
from ..files import write_atomically
from ..images.pixels import as_stored
from ..images.writers import write_tiff
from ..models.outputs import outputs_of
from ..predict.ahead import Opened
from ..predict.index import Index
from ..predict.job import Job, Result, Start, Unit
from ..predict.options import RunOptions, Scores, Summary, Watch
from ..predict.predictor import Classifier, Opener, naming, open_one
from ..predict.rows import Work
from ..predict.runner import run
from ..train.explanation import Explanation, caption, explain_class, log_odds_of
from ..train.heatmap import overlay_name, write_overlay
from .maps import explain_gradient
from .marks import find_marks
from .seg import write_segmentation

Method = Literal["activation", "gradient"]
Format = Literal["png", "tif", "seg", "binary-seg"]
METHODS = {"activation": explain_class, "gradient": explain_gradient}

_MARK = pa.struct([(name, pa.float64()) for name in ("row", "column", "score")])
EXPLAINED = pa.schema(
    [
        ("key", pa.string()),
        ("model", pa.string()),
        ("image_path", pa.string()),
        ("pixels", pa.int64()),
        ("name", pa.string()),
        ("class", pa.string()),
        ("log_odds", pa.float64()),
        ("marks", pa.list_(_MARK)),
    ]
)
"""Of the parts. `name` is that of the image's files without suffix; marks are of class activation maps only."""


@dataclass(frozen=True)
class Options(RunOptions):
    """How a run of explanations goes; see also `RunOptions`.

    Attributes:
        method: of `METHODS`.
        label: the class whose map it is; None takes the second of two, else the most probable one.
        formats: of png, tif, seg and binary-seg.
    """

    method: Method = "activation"
    label: str | None = None
    formats: tuple[Format, ...] = ("png",)


def explain(
    opener: Opener,
    sources: Sequence[str | Path | Record],
    out: str | Path,
    options: Options,
    watch: Watch | None = None,
) -> Summary:
    """Write the maps of images into ``out``, on the pixels of their files as stored, and ``marks.csv``.

    For an image called NAME: ``NAME.png`` (``.tif`` where it is very large), the map drawn over it with the class and
    its probability; ``NAME.map.tif``, its values in float32; ``NAME.seg.dcm``, a fractional, or
    ``NAME.binary.seg.dcm``, a binary DICOM SEG. marks.csv has the peaks of class activation maps, for `gigamorph eval
    --marks`. What is done stays done, whatever ends the run, see `gigamorph.engine.predict.runner.run`.

    Args:
        opener: opens the network; to be pickled where there are several devices.
        sources: tables, folders, images, or records.

    Raises:
        DataError: a damaged image, or one that cannot be written so, named; a class that is none.
        GigamorphError: if ``out`` holds something else, or cannot be written.
    """
    return run(_Explain(opener, options), sources, out, options, watch)


class _Explain(Job):
    kind, made, schema, named = "explain", "explanations", EXPLAINED, "name"

    _classifier: Classifier
    _out: Path

    def __init__(self, opener: Opener, options: Options) -> None:
        self._opener, self._options = opener, options
        self.product = "marks.csv" if options.method == "activation" else ""

    def described(self) -> dict[str, Any]:
        options = self._options
        return {"method": options.method, "class": options.label or "", "format": sorted(options.formats)}

    def differs(self, name: str, before: Any) -> str:
        if name == "format":
            before = " --format ".join(before)
        return super().differs(name, before or "the default")

    def open(self, options: RunOptions) -> None:
        self._classifier = self._opener(device=options.device if options.here else "cpu")
        self.classes = self._classifier.classes
        label = self._options.label
        if label is not None and label not in self.classes:
            raise DataError(f"{options.checkpoint}: has no class {label!r}; there are {', '.join(self.classes)}")

    def begin(self, out: Path, secret: Callable[[], bytes]) -> None:
        self._out = out

    def unit(self) -> Unit:
        return Explaining(self._classifier, self._options, self._out)

    def start(self) -> Start:
        return functools.partial(_start, self._opener, self._options, self._out)

    def tables(self, index: Index, results: Iterable[Result], out: Path) -> Scores:
        if self._options.method == "activation":
            rows = (
                [row.name, result["class"], f"{mark['row']:.2f}", f"{mark['column']:.2f}", repr(mark["score"])]
                for row, result in index.joined(results)
                for mark in result["marks"]
            )
            write_atomically(out / "marks.csv", lambda path: _write_marks(path, rows), "table")
        return {}


class Explaining:
    """The unit (`job.Unit`) that explains."""

    def __init__(self, classifier: Classifier, options: Options, out: Path) -> None:
        classifier.net.eval()
        self.net, self._classifier, self._options, self._out = classifier.net, classifier, options, out

    def open(self, record: Record, work: Work) -> dict[str, Any]:
        return open_one(self._classifier, record, work)

    def __call__(self, opened: Opened) -> Result:
        assert opened.item is not None
        work, options, classes = opened.work, self._options, self._classifier.classes
        source, image = opened.item["image"], work.row.name
        output = None if options.label is None else classes.index(options.label)
        with naming(image):
            found, logits, which = METHODS[options.method](self.net, source, output)
        log_odds = float(log_odds_of(logits.double().cpu()[None], which, outputs_of(self.net))[0])
        for one in options.formats:
            if work.row.url and one in ("seg", "binary-seg"):
                raise DataError(
                    f"{image}: a DICOM SEG is written of files of this machine; fetch it, or write png or tif"
                )
            _write(found, work.row.record.path, self._out, work.name, one, classes[which], log_odds)
        marks = find_marks(found) if options.method == "activation" else []
        return {
            "key": work.key,
            "model": options.model,
            "image_path": image,
            "pixels": source.shape[-2] * source.shape[-1],
            "name": work.name,
            "class": classes[which],
            "log_odds": log_odds,
            "marks": [mark._asdict() for mark in marks],
        }


def _start(opener: Opener, options: Options, out: Path, *, device: str) -> Explaining:
    return Explaining(opener(device=device), options, out)


def _write(found: Explanation, image: Path, out: Path, stem: str, one: Format, label: str, log_odds: float) -> None:
    if one == "png":
        name = overlay_name(stem, as_stored(found.source).shape)
        write_overlay(found, out / name, stored=True, caption=caption(label, log_odds))
    elif one == "tif":
        dtype = np.dtype(np.float32)
        path = out / f"{stem}.map.tif"
        write_atomically(path, lambda p: write_tiff(p, found.size, dtype, found.read), "map")
    elif one == "seg":
        write_segmentation(found, image, out / f"{stem}.seg.dcm", label=label, kind="fractional")
    else:
        write_segmentation(found, image, out / f"{stem}.binary.seg.dcm", label=label, kind="binary")


def _write_marks(path: Path, rows: Iterator[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image_path", "class", "row", "column", "score"])
        writer.writerows(rows)
