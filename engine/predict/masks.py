"""Prediction of masks over an archive: a file of classes for each image, and a table of what they take up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from torch import Tensor, nn

from ..accelerate import Accelerated, accelerate
from ..datasets.masks import IGNORED, Mask, mask_as_stored, masks_of, strips
from ..datasets.tables import SPLITS, Record, reading_of
from ..dense import map_shape, write_map
from ..errors import DataError
from ..files import temporary_name, whole_or_absent
from ..images.dicom_results import highdicom_errors, own_code, segment, segmentation, source_header
from ..images.open import open_pixels
from ..images.pixels import PixelSource
from ..images.writers import write_png, write_tiff
from ..train.checkpoint import load_checkpoint
from ..train.data import Images
from ..train.heatmap import overlay_name
from ..train.inputs import images
from ..train.mask_target import MaskTarget, dice, dice_scores
from ..train.network import restore_network, target_of
from ..train.splits import with_splits
from ..train.stored import preprocessing_of
from .decoders import Opened
from .delivery import Document
from .index import Index
from .job import PredictJob, Result, Start, Unit, texts
from .options import RunOptions, Scores, Summary, Watch
from .predictor import Wanted, headed, naming
from .rows import Row, Work
from .runner import run
from .tables import patient_of, write_csv

MASKS = pa.schema(
    [
        *texts("key", "model", "image_path", "header_patient", "laterality", "view"),
        ("pixels", pa.int64()),
        *texts("name", "mask"),
        ("area", pa.list_(pa.int64())),
        ("counts", pa.list_(pa.int64())),
    ]
)
"""Of the parts: the mask's name and its file, its pixels of each class; where the table has a mask, counts (3, classes)
as of `gigamorph.engine.train.mask_target.MaskLoss`, row by row."""


class Classes(nn.Module):
    """A network's likeliest class of each place: (N, C, H, W) -> (N, H', W') uint8."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(1).to(torch.uint8)


@dataclass(frozen=True)
class Segmenter:
    """A network of masks, ready to predict.

    Attributes:
        net: pixel source -> (1, H', W') classes.
        open_images: of records.
        trained_on: how many images the training had; their table tells which split an image was in.
    """

    net: Accelerated
    target: MaskTarget
    open_images: Callable[[Sequence[Record]], Images]
    trained_on: int


class MaskOpener(Protocol):
    """Opens the network in the process that computes; to be pickled where there are several."""

    def __call__(self, *, device: str) -> Segmenter: ...


def gives_masks(checkpoint: str | Path) -> bool:
    """Whether a checkpoint of `gigamorph train` is of masks."""
    return not Path(checkpoint).is_dir() and target_or_none(load_checkpoint(checkpoint)) is not None


def target_or_none(stored: dict[str, Any]) -> MaskTarget | None:
    """What a checkpoint's network says of each pixel; None if it says nothing of them."""
    record = stored["gigamorph"]
    target = target_of(record) if "options" in record else None
    return target if isinstance(target, MaskTarget) else None


def open_segmenter(path: str | Path, *, memory_budget: int | None, device: str) -> Segmenter:
    """The trained network of a checkpoint in a budget and on a device.

    Raises:
        DataError: if it is none of masks.
    """
    stored = load_checkpoint(path)
    record, target = stored["gigamorph"], target_or_none(stored)
    if target is None:
        raise DataError(f"{path}: is no network of masks; train one with --task masks")
    prepared = preprocessing_of(record, path)
    trained = restore_network(stored, path, memory_budget=memory_budget, device=device)
    net = accelerate(Classes(trained._network), memory_budget, batch_norm=record["options"].get("batch_norm"))
    return Segmenter(
        net,
        target,
        lambda records: images(with_splits(records, record), record["channels"], prepared),
        sum(record["split"].get(name, 0) for name in SPLITS),
    )


class Drawing:
    """The unit (`job.Unit`) that predicts masks."""

    def __init__(self, segmenter: Segmenter, wanted: Wanted) -> None:
        segmenter.net.eval()
        self.net, self._segmenter, self._wanted = segmenter.net, segmenter, wanted

    def open(self, record: Record, work: Work) -> dict[str, Any]:
        return {**self._segmenter.open_images([record])[0], "record": work.row.record}

    def __call__(self, opened: Opened) -> Result:
        return draw(self._segmenter, self._wanted, opened)


def draw(segmenter: Segmenter, wanted: Wanted, opened: Opened) -> Result:
    """Write an image's mask in the size and orientation of its file; the result, a row of `MASKS`.

    Blocks of the map go to a file beside the mask as they are computed, and from there to the mask.

    Raises:
        DataError: if the image, or the mask that the table has of it, cannot be read, or the mask not be written.
        BudgetError: if no tile of the image fits. All name it.
    """
    item, work = opened.item, opened.work
    assert item is not None
    source, record = item["image"], work.row.record
    own = segmenter.target.stored(record, source) if masks_of(record) else None
    raw = temporary_name(wanted.out / "masks" / f"{work.name}.npy")
    try:
        with naming(work.row.name):
            write_map(segmenter.net, source, raw)
        mask = mask_as_stored(Held(np.load(raw, mmap_mode="r")), source)
        target = wanted.out / "masks" / overlay_name(work.name, (1, *mask.shape))
        with whole_or_absent(target) as part:
            if target.suffix == ".png":
                write_png(part, mask.shape, mask.read)
            else:
                write_tiff(part, mask.shape, np.dtype(np.uint8), mask.read)
        area, counts = _counted(mask, own, len(segmenter.target.names))
    except OSError as error:
        raise DataError(f"{wanted.out / 'masks'}: cannot be written ({error.strerror or error})") from error
    finally:
        raw.unlink(missing_ok=True)
    return {
        "key": work.key,
        "model": wanted.model,
        "image_path": work.row.name,
        **headed(source, wanted.secret),
        "pixels": source.shape[-2] * source.shape[-1],
        "name": work.name,
        "mask": target.name,
        "area": area.tolist(),
        "counts": None if counts is None else counts.ravel().tolist(),
    }


class Held:
    """Classes (1, rows, columns) in memory or mapped to it, read by region."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values[0]
        self.shape: tuple[int, int] = self._values.shape

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return np.asarray(self._values[top:bottom, left:right])


def mask_of(net: Accelerated, source: PixelSource) -> np.ndarray:
    """The mask of an image in the size and orientation of its file, uint8 (rows, columns); a byte a cell is held.

    Args:
        net: of a `Segmenter`.

    Raises:
        DataError: if the image cannot be read. BudgetError: if no tile of it fits.
    """
    values = np.empty(map_shape(net, source), np.uint8)
    write_map(net, source, values)
    mask = mask_as_stored(Held(values), source)
    return mask.read(0, mask.shape[0], 0, mask.shape[1])


def _counted(found: Mask, own: Mask | None, classes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels of each class (classes,), and with a mask (3, classes) of both, of the prediction and of the mask."""
    area, counts = np.zeros(classes, np.int64), np.zeros((3, classes), np.int64)
    for top, bottom in strips(found.shape[0]):
        values = found.read(top, bottom, 0, found.shape[1])
        area += np.bincount(values.ravel(), minlength=classes)
        if own is not None:
            true = own.read(top, bottom, 0, found.shape[1])
            judged = true != IGNORED
            counts[0] += np.bincount(true[judged & (true == values)], minlength=classes)
            counts[1] += np.bincount(values[judged], minlength=classes)
            counts[2] += np.bincount(true[judged], minlength=classes)
    return area, None if own is None else counts


@dataclass(frozen=True)
class MaskOptions(RunOptions):
    """How a run of masks goes; see also `RunOptions`.

    Attributes:
        identifiers: name patients that only the DICOM headers name; they are numbered otherwise.
    """

    identifiers: bool = False


def predict_masks(
    opener: MaskOpener,
    sources: Sequence[str | Path | Record],
    out: str | Path,
    options: MaskOptions,
    watch: Watch | None = None,
) -> Summary:
    """Predict the masks of images into ``out/masks``, and write ``predictions.csv``; see `runner.run`.

    The table has each image's mask, the share of its pixels that each class takes, and, where the images' table names a
    mask, the Dice of each class but the background; empty where neither has it.

    Raises:
        DataError: a damaged image or mask, named; a table that is wrong.
        GigamorphError: if ``out`` holds other results or is held by another process, cannot be written, or too many
            images failed.
    """
    return run(_Masks(opener, options), sources, out, options, watch)


class _Masks(PredictJob):
    schema, named = MASKS, "name"

    _options: MaskOptions
    _network: Segmenter
    _wanted: Wanted

    def described(self) -> dict[str, Any]:
        own = self._options
        return {"identifiers": own.identifiers, "precision": own.precision, "white": own.white}

    def key(self, row: Row, model: str) -> str:
        # By the table's masks too, with which the result compares.
        return row.key("\0".join([model, *map(str, masks_of(row.record))]))

    def begin(self, out: Path, secret: Callable[[], bytes]) -> None:
        try:
            (out / "masks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
        self._wanted = Wanted(self._options.model, out, secret=None if self._options.identifiers else secret())

    def unit(self) -> Unit:
        return Drawing(self._network, self._wanted)

    def start(self) -> Start:
        return functools.partial(_start, self._opener, self._wanted)

    def tables(self, index: Index, results: Iterable[Result], out: Path) -> Scores:
        names = self._network.target.names
        counts: dict[str, list[np.ndarray]] = {}

        def rows() -> Iterator[list[object]]:
            for row, result in index.joined(results):
                shape = None if result["counts"] is None else np.reshape(result["counts"], (3, len(names)))
                if shape is not None:
                    of_split = counts.setdefault(row.record.split or "", [np.zeros_like(shape), np.zeros(1, int)])
                    of_split[0] += shape
                    of_split[1] += 1
                yield [*self._who(row, result, index), *_measures(result, shape, len(names))]

        keys = ["image_path", *index.reading, "patient_id", "exam_id", "laterality", "view", "split", "mask"]
        header = [*keys, *(f"share_{name}" for name in names), *(f"dice_{name}" for name in names[1:])]
        write_csv(out / "predictions.csv", header, rows())
        self.write_note(out, masks={"classes": list(names), "binary": self._network.target.binary})
        return {split: dice_scores(total, int(number[0]), names) for split, (total, number) in counts.items()}

    def documents(self, index: Index, results: Iterable[Result], out: Path) -> Iterator[Document]:
        """A DICOM SEG for each image."""
        for row, result in index.joined(results):
            make = functools.partial(mask_segmentation, row, out / "masks" / result["mask"], self._network.target.names)
            yield Document(f"{result['key']}\0segmentation", row.name, make)

    def _who(self, row: Row, result: Result, index: Index) -> list[str]:
        own, patient = row.record, patient_of(row, result, index, self._options.identifiers)
        side, view = own.laterality or result["laterality"], own.view or result["view"]
        reading = reading_of(own)
        how = (reading.get(name, "") for name in index.reading)
        return [row.name, *how, patient, own.exam_id or "", side, view, own.split or "", f"masks/{result['mask']}"]


def mask_segmentation(row: Row, mask: Path, names: Sequence[str], uid: str) -> Dataset:
    """A predicted mask as DICOM SEG, a segment for each class but the background.

    Args:
        names: of the classes; segments have codes of their own, with these as meanings.
        uid: of the instance.

    Raises:
        DataError: if the image is no DICOM image of one frame, or its header lacks what a SEG must repeat.
    """
    header = source_header(row.place, "so that its mask cannot be stored")
    pixels = open_pixels(mask).stored
    _, height, width = pixels.shape
    if int(header.get("NumberOfFrames") or 1) != 1 or (header.Rows, header.Columns) != (height, width):
        raise DataError(f"{row.name}: has {header.get('NumberOfFrames', 1)} frames; masks are stored of images of one")
    with highdicom_errors(row.name, "a DICOM SEG"):
        segments = [
            segment(number, name, codes.SCT.SpatialAndRelationalConcept, own_code(name))
            for number, name in enumerate(names)
            if number
        ]
    values = np.asarray(pixels.read(0, height, 0, width))[0]
    return segmentation(row.name, header, values, segments, content="Classes of pixels", uid=uid)


def _start(opener: MaskOpener, wanted: Wanted, *, device: str) -> Drawing:
    return Drawing(opener(device=device), wanted)


def _measures(result: Result, counts: np.ndarray | None, classes: int) -> list[str]:
    area = np.array(result["area"], np.float64)
    values = [] if counts is None else dice(counts)[1:].tolist()
    told = ["" if np.isnan(value) else repr(value) for value in values] or [""] * (classes - 1)
    return [*(repr(share) for share in (area / area.sum()).tolist()), *told]
