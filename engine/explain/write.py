"""Writes explanations of many images, and a table of marks, by the runner of `gigamorph.engine.predict`."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ..datasets.dataset import ImageDataset
from ..datasets.tables import Record
from ..datasets.tables.cells import write_csv
from ..datasets.views import SliceSource
from ..errors import DataError
from ..files import write_atomically
from ..images.dicom_results import segment, segmentation, source_header
from ..images.dicomweb import is_dicomweb
from ..images.pixels import as_stored
from ..images.rawfile import one_line
from ..images.writers import write_tiff
from ..models.outputs import outputs_of
from ..predict.decoders import Opened
from ..predict.delivery import Document
from ..predict.index import RunDatabase
from ..predict.job import PredictJob, Result, Unit, texts
from ..predict.options import RunOptions, Scores, Summary, Watch
from ..predict.predictor import Classifier, NetworkUnit, Opener, Wanted, check_numbers, naming
from ..predict.rows import Row
from ..predict.runner import run
from ..predict.tables import prediction_of
from ..train.classify import prediction
from ..train.explanation import Explanation, caption, explain_class, explain_gradient, log_odds_of, positive_class
from ..train.heatmap import overlay_name, write_overlay
from .exams import View, write_exams
from .maps import Mark, find_marks

Kind = Literal["fractional", "binary"]
REGION = 0.5
"""Fraction of the map's maximum from which a pixel belongs to the region of a binary SEG."""
_STRIP = 512


def write_segmentation(found: Explanation, image: str | Path, path: str | Path, *, label: str, kind: Kind) -> None:
    """Write the relative map (`Explanation.relative`) of a DICOM image as a SEG of its size, with one segment.

    Args:
        found: the map.
        image: the explained DICOM file, of a single frame, or its URL in a DICOMweb store.
        path: of the SEG.
        label: of the segment.
        kind: "fractional" maps 1 to 255 (which is not a probability of a lesion); "binary" has the region of at least
            half of the maximum, which every viewer can show, and is empty if the class is less probable than not.

    Raises:
        DataError: if highdicom is missing, the image is not a DICOM file of one frame, or its header lacks an attribute
            that a SEG must repeat.
    """
    try:
        import highdicom  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise DataError("DICOM SEG needs highdicom: pip install highdicom") from error
    header = source_header(image, "so it cannot have a DICOM SEG; write png or tif")
    frames = int(header.get("NumberOfFrames") or 1)
    if frames != 1 or (header.Rows, header.Columns) != found.size:
        raise DataError(f"{image}: has {frames} frames; a DICOM SEG needs one; write png or tif")
    shown = found.relative()
    heat = _pixel_map(shown)
    pixels = heat if kind == "fractional" else _region(heat, shown)
    described = segment(1, label, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion)
    try:
        seg = segmentation(image, header, pixels, [described], content="Relative evidence of a network")
    except DataError as error:
        raise DataError(f"{error}; write png or tif") from error
    write_atomically(path, lambda p: seg.save_as(p), "DICOM SEG")


def _region(heat: np.ndarray, shown: Explanation) -> np.ndarray:
    called = shown.log_odds is None or shown.log_odds >= 0
    return (heat >= REGION * float(shown.values.max())) & (heat > 0) & called


def _pixel_map(found: Explanation) -> np.ndarray:
    height, width = found.size
    heat = np.empty((height, width), np.float32)
    for top in range(0, height, _STRIP):
        bottom = min(top + _STRIP, height)
        heat[top:bottom] = found.read(top, bottom, 0, width)
    return heat.clip(0, 1, out=heat)


Method = Literal["activation", "gradient"]
Format = Literal["png", "tif", "seg", "binary-seg"]
SEGMENTATIONS = {"seg": ".seg.dcm", "binary-seg": ".binary.seg.dcm"}
"""Suffixes of files in these formats."""
_SEG_ENDS = tuple(SEGMENTATIONS.values())
METHODS = {"activation": explain_class, "gradient": explain_gradient}

_MARK = pa.struct([(name, pa.float64()) for name in ("row", "column", "score")])
EXPLAINED = pa.schema(
    [
        *texts("key", "model", "image_path"),
        ("pixels", pa.int64()),
        *texts("name", "class"),
        ("log_odds", pa.list_(pa.float64())),
        ("exclusive", pa.bool_()),
        *texts("header_patient", "laterality", "view"),
        ("marks", pa.list_(_MARK)),
        ("slice", pa.int64()),
    ]
)
"""Schema of the parts. `name` is the name of the image's files without suffix; only class activation maps have marks,
highest first; `slice` is the explained slice of a volume; other columns are those of
`gigamorph.engine.predict.predictor.RESULTS`."""


@dataclass(frozen=True)
class ExplainOptions(RunOptions):
    """Options of a run of explanations; see also `RunOptions`.

    Attributes:
        method: one of `METHODS`.
        label: the explained class; None takes the positive one of two, else the most probable one.
        formats: any of png, tif, seg and binary-seg.
    """

    method: Method = "activation"
    label: str | None = None
    formats: tuple[Format, ...] = ("png",)


def explain(
    opener: Opener,
    sources: Sequence[str | Path | Record],
    out: str | Path,
    options: ExplainOptions,
    watch: Watch | None = None,
) -> Summary:
    """Write maps of images, on the pixels of the stored files, and ``marks.csv`` into ``out``.

    For an image NAME: ``NAME.png`` (``.tif`` if very large), the map drawn over the image with the class and its
    probability; ``NAME.map.tif``, the values in float32; ``NAME.seg.dcm``, a fractional, or ``NAME.binary.seg.dcm``, a
    binary DICOM SEG. marks.csv has the peaks of class activation maps, for `gigamorph eval --marks`; exams.csv has the
    combined result (`combined`) of exams with several views. An interrupted run can be resumed, see
    `gigamorph.engine.predict.runner.run`.

    Args:
        opener: opens the network; must be picklable if there are several devices.
        sources: tables, folders, images, or records.
        out: folder of the results.
        options: of the run.
        watch: callbacks.

    Raises:
        DataError: naming an image that is damaged or cannot be written in a format; or for an unknown class.
        GigamorphError: if ``out`` has other content, or cannot be written.
    """
    return run(_Explain(opener, options), sources, out, options, watch)


class _Explain(PredictJob):
    kind, made, schema, named = "explain", "explanations", EXPLAINED, "name"
    files = ("marks.csv", "exams.csv", *(f"{{name}}{end}" for end in (".png", ".tif", ".map.tif", *_SEG_ENDS)))

    _options: ExplainOptions
    _network: Classifier
    _wanted: Wanted

    def __init__(self, opener: Opener, options: ExplainOptions) -> None:
        super().__init__(opener, options)
        self.product = "marks.csv" if options.method == "activation" else ""

    def described(self) -> dict[str, Any]:
        options = self._options
        given = {"method": options.method, "class": options.label or "", "format": sorted(options.formats)}
        return {**given, "flip": list(options.flips), "white": options.white}

    def differs(self, name: str, before: Any) -> str:
        return super().differs(name, before or "the default")

    def open(self, options: RunOptions) -> None:
        super().open(options)
        self.classes = self._network.classes
        label = self._options.label
        if label is not None and label not in self.classes:
            raise DataError(f"{options.checkpoint}: unknown class {label!r}; it has {', '.join(self.classes)}")

    def look(self, index: RunDatabase, watch: Watch) -> None:
        watch.looked(self._network, [row.record for row in index.sample(4) if not row.url])

    def begin(self, out: Path, secret: Callable[[], bytes]) -> None:
        self._wanted = Wanted(self._options.model, out, secret=secret())

    def compute(self) -> Callable[[Any], Unit]:
        return functools.partial(ExplanationUnit, options=self._options, wanted=self._wanted)

    def documents(self, index: RunDatabase, results: Iterable[Result], out: Path) -> Iterator[Document]:
        """The written DICOM SEGs."""
        for row, result in index.joined(results):
            for one in self._options.formats:
                if one in SEGMENTATIONS:
                    path = out / f"{result['name']}{SEGMENTATIONS[one]}"
                    yield Document(f"{result['key']}\0{path.name}", row.name, lambda uid, path=path: _read(path))

    def tables(self, index: RunDatabase, results: Iterable[Result], out: Path) -> Scores:
        assert self.classes is not None
        classes, label = self.classes, self._options.label
        frame = ["frame"] if "frame" in index.reading else []  # marks are in pixels of the stored file
        images = self._network.open_images([])
        slices = ["slice"] if isinstance(images, ImageDataset) and images.volume else []

        def marks() -> Iterator[list[str]]:
            for row, result in index.joined(results):
                view = _view(row, result, index, classes)
                own = view.prediction
                index.store_items([(own.image, own.patient, own.exam, own.laterality, view)])
                for mark in result["marks"]:
                    yield [
                        row.name,
                        *(own.reading.get(name, "") for name in frame),
                        result["class"],
                        f"{mark['row']:.2f}",
                        f"{mark['column']:.2f}",
                        *(str(result[name]) for name in slices),
                        repr(mark["score"]),
                    ]

        if self._options.method == "activation":
            header = ["image_path", *frame, "class", "row", "column", *slices, "score"]
            write_csv(out / "marks.csv", header, marks(), "\n")
        else:
            collections.deque(marks(), maxlen=0)
        outputs = outputs_of(self._network.net)
        # Numbers are not combined like probabilities, and networks of combined views combine them differently.
        if outputs is not None and (outputs.numbers or outputs.views is not None):
            return {}
        exams = (views for views in index.groups("exam") if len(views) > 1)
        first = next(exams, None)
        if first is not None:
            which = None if label is None else classes.index(label)
            every = itertools.chain([first], exams)
            write_exams(out / "exams.csv", every, classes, which, frame)
        return {}


class ExplanationUnit(NetworkUnit):
    """The unit of explanation."""

    def __init__(self, network: Classifier, options: ExplainOptions, wanted: Wanted) -> None:
        super().__init__(network, wanted)
        self._options = options

    def __call__(self, opened: Opened) -> Result:
        assert opened.item is not None
        work, options, classes = opened.work, self._options, self._network.classes
        source, image = opened.item["image"], work.row.name
        heads = outputs_of(self.net)
        output = positive_class(classes, heads) if options.label is None else classes.index(options.label)
        with naming(image):
            found, logits, which = METHODS[options.method](self.net, source, output)
        check_numbers(logits, image)
        outputs = outputs_of(self.net)
        log_odds = float(log_odds_of(logits.double().cpu()[None], which, outputs)[0])
        text = caption(classes[which], log_odds, outputs is not None and outputs.numbers)
        for one in options.formats:
            if work.row.url and not is_dicomweb(work.row.url) and one in SEGMENTATIONS:
                raise DataError(
                    f"{image}: a DICOM SEG needs a local file or a DICOMweb store; download the image, or write png or "
                    "tif"
                )
            _write(found, work.row.place, self._wanted.out, work.name, one, classes[which], text)
        marks = find_marks(found) if options.method == "activation" else []
        predicted = prediction(opened.item, logits, outputs)
        return {
            **self._columns(source, work),
            "name": work.name,
            "class": classes[which],
            "log_odds": list(predicted.log_odds),
            "exclusive": predicted.exclusive,
            "marks": [mark._asdict() for mark in marks],
            "slice": found.source.number if isinstance(found.source, SliceSource) else None,
        }


def _view(row: Row, result: Result, index: RunDatabase, classes: Sequence[str]) -> View:
    marks = [Mark(**mark) for mark in result["marks"]]
    patient = row.record.patient_id if row.record.patient_known else ""
    predicted = prediction_of(row, result, index, None, identifiers=False)
    return View(predicted, patient, list(classes).index(result["class"]), next(iter(marks), None))


def _write(found: Explanation, image: str, out: Path, stem: str, one: Format, label: str, text: str) -> None:
    if one == "png":
        name = overlay_name(stem, as_stored(found.source).shape)
        write_overlay(found, out / name, stored=True, caption=text)
    elif one == "tif":
        dtype = np.dtype(np.float32)
        path = out / f"{stem}.map.tif"
        write_atomically(path, lambda p: write_tiff(p, found.size, dtype, found.read), "map")
    else:
        kind: Kind = "fractional" if one == "seg" else "binary"
        write_segmentation(found, image, out / f"{stem}{SEGMENTATIONS[one]}", label=label, kind=kind)


def _read(path: Path) -> Dataset:
    try:
        return dcmread(path)
    except Exception as error:  # pydicom has many error types
        raise DataError(f"{path}: cannot be read ({one_line(error)}); explain its image again") from error
